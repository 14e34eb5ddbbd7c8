"""Hydra configuration of `python -m trainer.serve`."""
