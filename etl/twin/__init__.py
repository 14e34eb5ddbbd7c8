"""Synthetic logs of Tenrec's shape from a known process, so that the best possible scores are known."""
