"""The study: experiments declared, run as trials, and told as a site of pages."""
