"""Session protocol presets."""
