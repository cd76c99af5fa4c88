"""The value function of score as action."""
