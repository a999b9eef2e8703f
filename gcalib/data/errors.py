"""The errors that all of `gcalib.data` raises."""


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that says what is wrong, where, and what would be right."""


class NoDataError(DataError):
    """Data that is not on this machine and cannot be fetched."""
