"""How the weights in `rpo/shapes/assets` are made: four scripts, what they learn from, and how the result is measured.

    python -m scripts.shapes.pretrain             the checkpoint, from nothing
    python -m scripts.shapes.pretrain_editor      the editor, from the checkpoint
    python -m scripts.shapes.pretrain_tokens      the token generator, from parts of the checkpoint
    python -m scripts.shapes.pretrain_proxy       the proxy reward, from nothing

Each takes `key=value` settings, lists them under --help, and goes on where it was when it is started again. The shipped
weights come from these networks, data, losses and numbers of updates by a loop whose learning rates of autoencoder and
proxy rose along a cosine; those of `rpo.training` rise in a line.
"""
