"""The error that all of `gcalib.data` raises."""


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that says what is wrong, where, and what would be right."""
