"""The errors that a user may see. Each message says what is wrong, where, and what to do, in one line.

The command line prints the message alone (no traceback) and exits with `exit_code`.
"""


class VilaError(Exception):
    """A failed run: exit code 1."""

    exit_code = 1


class UsageError(VilaError):
    """The request itself is wrong (a setting, a path, a combination): exit code 2."""

    exit_code = 2


class CheckpointError(VilaError):
    """A checkpoint that cannot be used: incomplete, of an unknown kind, or with the wrong weights."""


class SourceError(VilaError):
    """A source of samples that cannot be listed at all. One bad sample is a `SampleError`, never this."""


class OutputError(VilaError):
    """The output folder cannot be used: other settings, another process, a full disk."""
