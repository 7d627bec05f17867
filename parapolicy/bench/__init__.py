"""Measure what a network call and a chunk cost on this machine, beside the floor: ``python -m parapolicy.bench``."""
