"""What is optimised: pure functions from per-sample numbers to a loss and its metrics."""
