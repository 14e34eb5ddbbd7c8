"""Evaluate next-item retrieval by nearest-neighbour search over exported vectors."""
