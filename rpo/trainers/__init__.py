"""The trainers: each file is one algorithm, readable alone from top to bottom."""
