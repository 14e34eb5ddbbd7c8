"""Hydra configuration of `python -m cluster`."""
