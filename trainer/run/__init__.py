"""The run folder: checkpoints, metrics log, signals, profiling."""
