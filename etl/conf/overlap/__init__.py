"""Hydra configuration of `python -m etl.overlap`."""
