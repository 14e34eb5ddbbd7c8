"""Data loading: from Parquet sessions to training batches."""
