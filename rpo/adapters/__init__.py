"""The LoRA layer: on the model, in its file, and several as one."""
