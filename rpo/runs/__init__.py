"""What the commands do from start to end: a training from a file, rounds, the quickstart."""
