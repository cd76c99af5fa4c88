"""Rich preference optimisation (arXiv:2503.11720, re-implemented from its idea): pairs that say why one is better.

prompts or images → critique → instruct → edit → score → decide → export. `records` has what passes between the stages,
`folder` what is kept of it, `stages` runs a stage over records, `curate` wires everything. The paper's inner settings
are not public: models, prompts, rules and limits here are our own.
"""
