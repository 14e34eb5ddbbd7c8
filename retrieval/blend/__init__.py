"""Blends several sources into one ranking, by weights or a re-ranker fitted on valid queries."""
