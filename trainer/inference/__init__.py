"""Scoring, validation, export of bundles."""
