"""Images and prompts to numbers: the rewards that come with the package, and how a name or an object becomes one.

`load_reward("jpeg-compressibility")`, `load_reward("my_package.scores:Aesthetic")`, the address of one that is served
(`rpo.rewards.remote`) and a function of one's own all give a `Reward`; `load_rewards({"shapes": 1.0,
"jpeg-compressibility": 0.1})` gives their weighted sum. A module is imported when its reward is asked for.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from rpo.errors import InputError
from rpo.plugins import load_plugin
from rpo.rewards.answers import RewardError
from rpo.rewards.base import Reward, WeightedRewards, score
from rpo.rewards.function import FunctionReward, adapt, takes_metadata
from rpo.rewards.mixture import MIXTURE, weights_of

__all__ = [
    "REWARDS",
    "Reward",
    "RewardError",
    "RewardLike",
    "WeightedRewards",
    "adapt",
    "load_reward",
    "load_rewards",
    "name_of",
    "score",
]

REWARDS = {
    "shapes": "rpo.shapes.reward:GRADED",
    "shapes-strict": "rpo.shapes.reward:STRICT",
    "shapes-critic": "rpo.shapes.reward:CRITIC",
    "words-judge": "rpo.words.reward:JUDGE",
    "jpeg-compressibility": "rpo.rewards.jpeg:COMPRESSIBILITY",
    "jpeg-incompressibility": "rpo.rewards.jpeg:INCOMPRESSIBILITY",
    "clip-score": "rpo.rewards.clip:CLIP_SCORE",
    "pick-score": "rpo.rewards.clip:PICK_SCORE",
    "shapes-clip": "rpo.shapes.proxy:REWARD",
    "shapes-potential": "rpo.shapes.potential:POTENTIAL",
    "shapes-tokens-potential": "rpo.shapes.potential:POTENTIAL_OF_TOKENS",
    "aesthetic": "rpo.rewards.aesthetic:AESTHETIC",
    "hps-v2": "rpo.rewards.hps:HPS_V2",
    "hps-v2.1": "rpo.rewards.hps:HPS_V2_1",
    "hps-v3": "rpo.rewards.hpsv3:HPS_V3",
    "image-reward": "rpo.rewards.image_reward:IMAGE_REWARD",
    "vqa-score": "rpo.curation.vlm.vqa_score:VQA_SCORE",
    "graded-judge": "rpo.curation.vlm.graded_judge:GRADED_JUDGE",
    "composition": "rpo.rewards.composition:COMPOSITION",
    "ocr": "rpo.rewards.ocr:OCR",
}
"""The rewards that have a name, and where they are."""

OF_CHECKPOINT = {
    "clip-score": "rpo.rewards.clip:clip_score",
    "pick-score": "rpo.rewards.clip:pick_score",
    "aesthetic": "rpo.rewards.aesthetic:aesthetic",
    "hps-v2": "rpo.rewards.hps:hps_v2",
    "hps-v2.1": "rpo.rewards.hps:hps_v2_1",
    "hps-v3": "rpo.rewards.hpsv3:hps_v3",
    "image-reward": "rpo.rewards.image_reward:image_reward",
    "composition": "rpo.rewards.composition:composition",
    "vqa-score": "rpo.curation.vlm.vqa_score:VqaScore",
    "graded-judge": "rpo.curation.vlm.graded_judge:GradedJudge",
}
"""What makes a reward of a checkpoint of one's own: "clip-score:FOLDER" or "clip-score:owner/name"."""

ADDRESSES = ("http://", "https://")
"""How a reward is named that is asked of a server."""

SingleReward = str | Reward | Callable[..., Any]
"""A name of `REWARDS`, with or without a checkpoint, "package.module:attribute", or the thing itself."""

RewardLike = SingleReward | Mapping[str, float] | WeightedRewards
"""One reward, or several names with their weights."""


def load_reward(spec: SingleReward) -> Reward:
    """Make a reward of a name or an object.

    Args:
        spec: A name of `REWARDS`; a name of `OF_CHECKPOINT`, a colon and a folder or hub id; a mixture of several
            (`rpo.rewards.mixture`); "package.module:attribute"; "http://HOST:PORT/NAME" of a server; or an object. A
            class is called without arguments, a function becomes a `FunctionReward`, as does what takes metadata, and
            any other callable object is taken as the reward that it is. See `rpo.rewards.function` for how it is
            called.

    Raises:
        ValueError: There is no such name, module or attribute, or what is there cannot be called, or not so.

    Example:
        >>> load_reward("jpeg-compressibility")
        JpegReward(is_small_good=True)
    """
    found = _named(spec) if isinstance(spec, str) else spec
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise InputError(
                f"reward {spec!r} is a class that cannot be made without arguments ({error}); expected one that can; "
                "name an instance of it instead"
            ) from error
    if not callable(found):
        raise InputError(
            f"reward {spec!r} is of type {type(found).__name__}, which cannot be called; expected something that takes "
            "(images, prompts); name a class, a function or an instance of this kind"
        )
    if isinstance(found, FunctionReward):
        return found
    is_plain = inspect.isroutine(found) or isinstance(found, partial)
    asks_for_metadata = takes_metadata(found)
    return adapt(found, metadata=asks_for_metadata) if is_plain or asks_for_metadata else cast(Reward, found)


def load_rewards(specs: RewardLike) -> WeightedRewards:
    """Make the weighted sum that a configuration or a caller describes.

    Args:
        specs: Names or "package.module:attribute" with their weights, or a single reward, which gets the weight 1. A
            single object is called by the name of its class, or of the function.

    Raises:
        ValueError: As `load_reward`, or a weight is 0 or not finite.

    Example:
        >>> dict(load_rewards({"shapes": 1.0, "jpeg-compressibility": 0.1}).weights)
        {'shapes': 1.0, 'jpeg-compressibility': 0.1}
    """
    if isinstance(specs, WeightedRewards):
        return specs
    if isinstance(specs, Mapping):
        every = [(name_of(name), load_reward(name), weight) for name, weight in specs.items()]
        names = [name for name, *_ in every]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(
                f"the rewards {', '.join(specs)} have the name {twice[0]!r} twice; expected each once, wherever it is "
                "served; leave one out"
            )
        return WeightedRewards({name: (reward, weight) for name, reward, weight in every})
    return WeightedRewards({name_of(specs): (load_reward(specs), 1.0)})


def _named(spec: str) -> Any:
    if spec.startswith(ADDRESSES):
        from rpo.rewards.remote.client import RemoteReward

        return RemoteReward(spec)
    name, colon, checkpoint = spec.partition(":")
    if colon and name == MIXTURE:
        return load_rewards(weights_of(checkpoint))
    if not colon or name not in REWARDS:
        return load_plugin(spec, REWARDS, "reward")
    if name not in OF_CHECKPOINT or not checkpoint:
        fault = "names no checkpoint" if name in OF_CHECKPOINT else "takes no checkpoint"
        raise InputError(
            f"reward {spec!r} {fault}; expected NAME:FOLDER or NAME:owner/name with NAME of "
            f"{', '.join(OF_CHECKPOINT)}, or package.module:attribute; leave out ':{checkpoint}' for the usual one"
        )
    return load_plugin(name, OF_CHECKPOINT, "reward")(checkpoint)


def name_of(spec: SingleReward) -> str:
    """What messages and logs call a reward; of one that is served not where, since it may come back elsewhere.

    Example:
        >>> name_of("http://127.0.0.1:8765/ocr?seconds=60"), name_of("ocr")
        ('http:ocr', 'ocr')
    """
    if isinstance(spec, str):
        return _short(spec) if spec.startswith(ADDRESSES) else spec
    if isinstance(spec, FunctionReward | partial):
        return name_of(spec.func if isinstance(spec, partial) else spec.function)
    return spec.__name__ if isinstance(spec, type) or inspect.isroutine(spec) else type(spec).__name__


def _short(address: str) -> str:
    from rpo.rewards.remote.client import address_of

    return address_of(address).short
