"""Submit and chain the etl, trainer and retrieval programs."""
