"""Editors carry out instructions: one class for every editing pipeline of diffusers, and a table of their families."""
