"""What is timed and measured, not asserted: ratios and what they are ratios of."""
