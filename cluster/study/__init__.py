"""The study: declared experiments, run as trials, and published as a static site."""
