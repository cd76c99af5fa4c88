"""How good a model is, and how sure that is: paired comparisons, intervals, held-out prompts."""
