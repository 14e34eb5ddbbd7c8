"""Hyperparameter search: spaces, trials, their table and page."""
