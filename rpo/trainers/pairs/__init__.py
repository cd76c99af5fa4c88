"""From pairs of images to the loss of an update."""
