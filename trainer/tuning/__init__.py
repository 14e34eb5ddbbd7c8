"""Hyperparameter search: spaces, trials, result table and page."""
