"""Hydra configuration of `python -m retrieval.average`."""
