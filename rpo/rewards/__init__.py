"""Images and prompts to numbers: the rewards, and how a name becomes one."""
