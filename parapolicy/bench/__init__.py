"""Benchmark network calls and chunks on this machine against a roofline: ``python -m parapolicy.bench``."""
