"""What the process is: pure functions of tensors, with no networks and no randomness of their own."""
