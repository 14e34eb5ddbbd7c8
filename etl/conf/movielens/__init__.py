"""Hydra configuration of `python -m etl.movielens`."""
