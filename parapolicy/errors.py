"""Errors in a user's input. Each message names the bad value, what was expected, and the way out."""


class CheckpointError(ValueError):
    """A policy folder or a file in it is missing, damaged, hostile, or does not match its configuration."""


class ObservationError(ValueError):
    """An observation has a missing or unknown key, a wrong shape, or a value that is not finite."""


class DataError(ValueError):
    """A demonstration data set lacks an array, or holds values that cannot be trained on."""
