"""The error of wrong input: what rpo raises on purpose, and what a command shows as one line instead of a traceback."""


class InputError(ValueError):
    """A mistake in what was given: it says what was given, what was expected and what to do."""
