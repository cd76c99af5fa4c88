"""Continuous-time reinforcement learning outside diffusion: a small control problem whose answer is known."""
