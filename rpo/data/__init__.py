"""Preference data: from files and tables to pixels, latents and embeddings.

`preference` is the record, `readers` finds records, `writers` keeps them, `check` says what a set is, `transform` makes
pixels of a pair, `cache` encodes each image and each prompt once. Nothing here knows a model or a trainer.
"""
