"""Synthetic logs (twins) shaped like Tenrec's, from a known process, so that the best possible scores are known."""
