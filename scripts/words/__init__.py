"""How the weights in `rpo/words/assets` are made: `python -m scripts.words.pretrain`, on what `scripts.shapes` has."""
