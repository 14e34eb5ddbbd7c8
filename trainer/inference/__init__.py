"""Inference: scoring, validation, bundle export."""
