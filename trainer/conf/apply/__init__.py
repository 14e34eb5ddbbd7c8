"""Hydra configuration of `python -m trainer.apply`."""
