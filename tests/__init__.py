"""Tests of rpo, one folder per package; a regular package, so that no installed `tests` can shadow it."""
