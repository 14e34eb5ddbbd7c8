"""Execution engines of the sessions job: local processes or Spark."""
