"""Candidate sources: each scores some items for a batch of queries, from counts over the train clicks."""
