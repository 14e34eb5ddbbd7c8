"""Hydra configuration of `python -m etl.merlin`."""
