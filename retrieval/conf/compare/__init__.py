"""Hydra configuration of `python -m retrieval.compare`."""
