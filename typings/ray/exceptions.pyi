"""Of an extra, which need not be installed: what is named by its class."""

class RayError(Exception): ...

class RayTaskError(RayError):
    cause: object
