"""Hydra configuration of `python -m trainer.tune`."""
