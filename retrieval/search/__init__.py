"""Nearest-neighbour search: exact search, indexes, tuning."""
