"""What every program stands on: errors, options, output folders, object stores, progress."""
