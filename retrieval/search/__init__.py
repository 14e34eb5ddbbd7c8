"""Nearest-neighbour search: exact, indexes, tuning."""
