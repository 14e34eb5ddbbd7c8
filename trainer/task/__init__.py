"""Model tasks: session models (next item and feedback) and ranking models (rows)."""
