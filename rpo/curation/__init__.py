"""Rich preference optimisation (arXiv:2503.11720, re-implemented from its idea): pairs that say why one is better.

prompts or images → critique → instruct → edit → score → decide → export. `records` has what passes between the stages,
`stages` says of each what it asks of whom and what it keeps, `pipeline` takes records through them, `store` keeps what
is found, and `curate` wires everything. The paper's inner settings are not public: models, prompts, rules and limits
here are our own.
"""
