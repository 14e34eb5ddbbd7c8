"""Shared runtime of all programs: errors, options, output folders, object stores, progress."""
