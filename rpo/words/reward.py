"""The judge of the words world as a reward: whether an image says the word that its prompt asks for.

It is there to judge what another reward, `ocr`, has taught. It runs on the CPU and takes about 1 ms for an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.rewards.base import RewardError
from rpo.types import Images, PerSample
from rpo.words.prompts import word_of
from rpo.words.reader import read_word
from rpo.words.world import HEIGHT, WIDTH


@dataclass(frozen=True)
class WordsJudge:
    """1 for an image that says what its prompt asks for, letter by letter, and 0 for any other.

    Example:
        >>> from rpo.words.world import Setting, render
        >>> image = torch.tensor(render(Setting("CAT"))).permute(2, 0, 1) / 255
        >>> WordsJudge()(torch.stack([image, image]), ['the word "CAT"', 'the word "CUT"'])
        tensor([1., 0.])
    """

    is_differentiable: ClassVar[bool] = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Read every image and compare it with the word of its own prompt."""
        if images.shape[1:] != (3, HEIGHT, WIDTH):
            raise InputError(
                f"images are {list(images.shape[1:])}, but words are judged in images of [3, {HEIGHT}, {WIDTH}]; give "
                "those that the checkpoint 'words' draws"
            )
        wanted: list[str] = []
        for index, prompt in enumerate(prompts):
            try:
                wanted.append(word_of(prompt))
            except InputError as error:
                raise RewardError(str(error), indices=[index], batch_size=len(images)) from error
        read = [read_word(pixels).word for pixels in to_pixels(images.detach().float())]
        return torch.tensor([float(one == word) for one, word in zip(read, wanted, strict=True)], device=images.device)


JUDGE = WordsJudge()
