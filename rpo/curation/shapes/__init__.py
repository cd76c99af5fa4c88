"""Critic and instructors of the embedded world, which know the truth."""
