"""From Parquet sessions to the batches of a step."""
