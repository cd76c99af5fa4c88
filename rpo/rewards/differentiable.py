"""Which rewards have a gradient in the image: a reward says so by `is_differentiable`, or shows it when it is asked."""

from rpo.errors import InputError
from rpo.rewards import REWARDS, load_reward
from rpo.rewards.base import Reward, WeightedRewards
from rpo.rewards.function import FunctionReward


def require_differentiable(rewards: WeightedRewards) -> None:
    """Refuse rewards that are known to have no gradient in the image; a function that says nothing passes."""
    for name, reward in rewards.each.items():
        if is_differentiable(reward) is False:
            raise without_gradient(name)


def is_differentiable(reward: Reward) -> bool | None:
    """What a reward says of itself; nothing where it says nothing."""
    if not isinstance(reward, FunctionReward):
        return getattr(reward, "is_differentiable", None)
    return getattr(reward.function, "is_differentiable", None) if reward.images == "tensor" else False


def with_gradient() -> list[str]:
    """The names of rewards that have one."""
    return [name for name in REWARDS if is_differentiable(load_reward(name))]


def without_gradient(name: str) -> InputError:
    """What to say of a reward that has none."""
    return InputError(
        f"reward {name!r} has no gradient in the image, which this algorithm follows; expected one that has: "
        f"{', '.join(with_gradient())}, or a torch function of the images' tensor; or take `rpo train endpoint` or "
        "`rpo train grpo`, which need none"
    )
