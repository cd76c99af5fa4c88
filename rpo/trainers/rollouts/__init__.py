"""From prompts to images, what their steps are worth, and the steps that are learnt from."""
