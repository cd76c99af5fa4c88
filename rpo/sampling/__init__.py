"""How images are drawn: one step for sampling and for replay."""
