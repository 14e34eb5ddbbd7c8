"""What is learned: sessions (next item and feedback) or ranking rows."""
