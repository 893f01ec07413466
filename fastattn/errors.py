"""Exceptions of fastattn."""


class UnsupportedError(NotImplementedError):
    """No backend, or not the one asked for by name, can run this problem; the message names the feature."""
