"""One training step: objective, losses, negatives."""
