"""Hydra configuration of `python -m etl.twin`."""
