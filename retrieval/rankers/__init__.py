"""Rankers: the model through its index, and the counted baselines."""
