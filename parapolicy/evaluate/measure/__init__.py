"""Measure chunks: time, error, distribution; and the statistics of scores."""
