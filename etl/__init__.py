"""Turn Tenrec CSV logs into a sharded Parquet dataset of sessions, with local processes or Spark."""
