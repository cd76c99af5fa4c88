"""Stub."""
def evaluate_checkpoint(folder, count, *, seed, device):
    return {}
