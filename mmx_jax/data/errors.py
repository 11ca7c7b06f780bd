"""Errors of the data path; every message names the file, field or source, what is wrong and what would be right."""


class DataError(RuntimeError):
    """Input that cannot be used, or a store that cannot be written or read."""


class TokenizerError(DataError):
    """A tokenizer that cannot be read or trained, or that does not fit."""


class StoreError(DataError):
    """A token store that is missing, unfinished or damaged."""
