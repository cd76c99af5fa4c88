"""The loop that every trainer shares: one update, its checkpoints, its log. It knows no algorithm."""
