"""Ranking and feedback metrics, accumulators, significance tests."""
