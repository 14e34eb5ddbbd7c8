"""Hydra configuration of `python -m trainer.export`."""
