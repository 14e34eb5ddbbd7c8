"""The tasks of the sessions job, in order."""
