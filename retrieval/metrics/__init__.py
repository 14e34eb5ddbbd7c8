"""Metrics of rankings and of feedback, their accumulators, significance tests."""
