"""Train session-based recommenders with several tasks and export their vectors."""
