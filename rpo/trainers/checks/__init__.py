"""What must hold before the first update."""
