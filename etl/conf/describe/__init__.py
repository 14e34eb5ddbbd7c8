"""Hydra configuration of `python -m etl.describe`."""
