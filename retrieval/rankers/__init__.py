"""Rankers: the model's index and the counted baselines."""
