"""Hydra configuration of `python -m trainer.show`."""
