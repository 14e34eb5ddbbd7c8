"""The study: experiments declared, run as trials, and published as a site of pages."""
