"""How a checkpoint becomes a process: the only place that knows networks and tokenizers."""
