"""Distributed training: ranks, collectives, sparse gradient exchange."""
