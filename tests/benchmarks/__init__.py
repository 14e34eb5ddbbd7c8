"""Benchmarks: timings and measurements without assertions, mostly ratios and the values behind them."""
