"""The error of wrong input: what rpo raises on purpose, and what a command shows as one line instead of a traceback."""

import errno

SURROUNDINGS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENOTCONN}
"""What the operating system answers where a disk is full or a file not ours: no mistake of rpo's code."""


class InputError(ValueError):
    """A mistake in what was given: it says what was given, what was expected and what to do."""
