"""Several sources joined into one ranking, by weights or a re-ranker that were learned on valid queries."""
