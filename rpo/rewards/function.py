"""Rewards as people have them: how a callable is called, told by its signature or by `adapt`.

    (images, prompts)               as rpo's own rewards
    (images, prompts, metadata)     as TRL's DDPOTrainer and ddpo-pytorch call them

By the signature, where it leaves no doubt: two parameters are the first form and three without a default the second.
A third one that has a default is metadata if that is its name. Everything else (`*args`, another third with a default,
no signature) is refused: `adapt` says what is meant. A torch module is asked about its `forward`.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from PIL import Image
from torch import Tensor, nn

from rpo.data.pixels import to_pixels
from rpo.data.prompts import metadata_of
from rpo.errors import InputError
from rpo.rewards.answers import Answered, answered, scores_and_info
from rpo.types import Images, PerSample

ImageForm = Literal["tensor", "pil", "uint8"]
"""Float tensor [n, 3, h, w] in [0, 1], list of PIL images, or array of bytes [n, h, w, 3]."""

Returns = Literal["scores", "scores_and_info"]

FORMS = ("tensor", "pil", "uint8")
RETURNS = ("scores", "scores_and_info")
_TWO, _THREE = 2, 3
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class FunctionReward:
    """What `function` says of the images and prompts, as one number per image on the images' device.

    Example:
        >>> import torch
        >>> longest_prompt_wins = FunctionReward(lambda images, prompts: [len(prompt) for prompt in prompts])
        >>> longest_prompt_wins(torch.zeros(2, 3, 8, 8), ["a cat", "a large cat"])
        tensor([ 5., 11.])
    """

    function: Callable[..., Any]
    """Takes images and one prompt per image; higher is better."""
    images: ImageForm = "tensor"
    """How it takes the images."""
    returns: Returns = "scores"
    """What it must answer with."""
    takes_metadata: bool = False
    """Whether it takes, as a third, what is known of each prompt: {} where nothing is."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Call the function; a gradient that its answer has is kept."""
        return self.answer(images, prompts).values

    def answer(self, images: Images, prompts: Sequence[str]) -> Answered:
        """Call the function for its scores and the means of its info."""
        given = _as(images, self.images), [str(prompt) for prompt in prompts]
        known = ([copy.deepcopy(metadata_of(prompt)) for prompt in prompts],) if self.takes_metadata else ()
        has_info = self.returns == "scores_and_info"
        scores, info = scores_and_info(self.function(*given, *known), has_info=has_info)
        said = answered(scores, info, len(images))
        has_gradient = isinstance(scores, Tensor) and scores.requires_grad
        return replace(said, values=(scores if has_gradient else said.values).float().to(images.device))


def adapt(
    function: Callable[..., Any] | None = None,
    *,
    images: ImageForm = "tensor",
    returns: Returns = "scores",
    metadata: bool | None = None,
) -> Any:
    """Say how a reward is called; also as a decorator.

    Args:
        function: The reward; left out in a decorator.
        images: What it takes images as: "tensor", float [n, 3, h, w] in [0, 1]; "pil", a list; "uint8", an array
            [n, h, w, 3]. Only of a tensor is there a gradient.
        returns: "scores", one number per image, with or without a mapping of info beside them; "scores_and_info" asks
            for a pair, whose second part may be anything.
        metadata: Whether a third argument is given, a list with what is known of each prompt; by the signature where it
            is left out.

    Returns:
        A reward; without `function` what makes one of it.

    Raises:
        InputError: There is no such form, or the signature leaves open how it is called.

    Example:
        >>> import torch
        >>> @adapt(images="pil")
        ... def width(images, prompts, metadata):
        ...     return [image.width for image in images], {"wanted": [one.get("width", 0) for one in metadata]}
        >>> width(torch.zeros(2, 3, 8, 16), ["a", "b"])
        tensor([16., 16.])
    """
    if function is None:
        return lambda decorated: adapt(decorated, images=images, returns=returns, metadata=metadata)
    for name, value, known in (("images", images, FORMS), ("returns", returns, RETURNS)):
        if value not in known:
            raise InputError(f"adapt was given {name}={value!r}; expected one of {', '.join(known)}; give one of them")
    if isinstance(function, type) or not callable(function):
        raise InputError(
            f"adapt was given {function!r}, but a function or an object that can be called is needed; adapt an "
            "instance, such as adapt(Mine())"
        )
    return FunctionReward(function, images, returns, takes_metadata(function) if metadata is None else metadata)


def takes_metadata(function: Callable[..., Any]) -> bool:
    """Whether a callable takes (images, prompts, metadata) and not (images, prompts), by its signature."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        raise _unclear(name, "has no signature that can be read") from None
    parameters = list(signature.parameters.values())
    named = [one for one in parameters if one.kind in _BY_POSITION]
    needed = sum(one.default is one.empty for one in named)
    if any(one.kind is one.KEYWORD_ONLY and one.default is one.empty for one in parameters) or needed > _THREE:
        raise _unclear(name, f"takes {signature}")
    if any(one.kind is one.VAR_POSITIONAL for one in parameters) and needed < _THREE:
        raise _unclear(name, f"takes {signature}, from which it cannot be told")
    if len(named) < _TWO:
        raise _unclear(name, f"takes {signature}")
    if needed < _THREE <= len(named) and named[_TWO].name != "metadata":
        raise _unclear(name, f"takes {signature}, whose {named[_TWO].name!r} may be metadata or a setting of its own")
    return needed == _THREE or (len(named) >= _THREE and named[_TWO].name == "metadata")


def _unclear(name: str, what: str) -> InputError:
    return InputError(
        f"reward {name!r} {what}; expected (images, prompts) or (images, prompts, metadata); say which: "
        "rpo.rewards.adapt(reward, metadata=False) or metadata=True, or wrap it in a function of these"
    )


def _as(images: Images, form: ImageForm) -> Any:
    if form == "tensor":
        return images
    pixels = to_pixels(images.detach().float())
    return pixels if form == "uint8" else [Image.fromarray(one) for one in cast(Any, pixels)]
