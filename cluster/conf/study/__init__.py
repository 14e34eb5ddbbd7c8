"""Study presets."""
