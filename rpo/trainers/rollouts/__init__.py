"""From prompts to images, what their steps are worth, and the points that are learnt from."""
