"""The training step: objective, losses, negatives."""
