"""Where the tasks of the sessions job run: in local processes or on Spark."""
