"""Hydra configuration of `python -m etl.kuairand`."""
