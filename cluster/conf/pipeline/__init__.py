"""Pipeline presets."""
