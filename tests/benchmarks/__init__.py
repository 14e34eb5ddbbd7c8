"""What is timed and measured, not asserted: ratios beside what they are ratios of."""
