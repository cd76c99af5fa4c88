"""The embedded proxy reward: a small CLIP model that agrees with the verifier often, not always."""

from rpo.rewards.clip import ClipReward
from rpo.shapes import PROXY

REWARD = ClipReward(PROXY)
