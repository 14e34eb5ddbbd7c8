"""Tested defaults by catalogue size and model."""
