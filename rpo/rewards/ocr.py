"""Whether an image shows the text that its prompt asks for in quotes, by RapidOCR, as Flow-GRPO rewards it.

score = 1 - min(d, n) / n,   d = Levenshtein distance of what is read to what is asked, n = letters asked

d is 0 where the text asked for occurs within what is read; blanks and case do not count. What is asked is what stands
in double quotes, several of them one after the other. 1 is right, 0 is nothing right or nothing read. It was made for
text rendering: nothing else of the image counts, and text beside the one asked for costs nothing.

RapidOCR's package (Apache-2.0) has the weights in it, PaddleOCR's small detector and recogniser (Apache-2.0, 31 MB).
It runs on the CPU, one image after another, by as many threads as torch, in 0.3 GB, and has no gradient: 30 words of 64
pixels a second on one core. A font size of 12 pixels and more is read. The authors ask PaddleOCR itself, which reads
with other weights.
"""

import re
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any, final

import torch

from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.rewards.answers import RewardError
from rpo.rewards.base import check_batch, check_range
from rpo.rewards.version import version_of
from rpo.types import Images, PerSample

SHORTEST_EDGE = 64
"""Smaller images are enlarged to this before text is looked for, larger ones left as they are. RapidOCR's own number,
736, takes many times as long for an image of 64 pixels and reads no more of it."""

LINE = (3, 48, 192)
"""Channels and height of a line that is read, and the width to which a shorter one is filled up. RapidOCR's own 320
costs a word half as much again."""

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


@final
class OcrReward:
    """How much of the text that is asked for can be read.

    Example:
        >>> OcrReward()
        OcrReward()
    """

    is_differentiable = False

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._engine: Any = None

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        return "OcrReward()"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Read every image and compare it with the quotes of its own prompt.

        Raises:
            RewardError: A prompt has no text in double quotes.
        """
        check_batch(images, prompts)
        check_range(images)
        wanted = [asked_text(prompt) for prompt in prompts]
        silent = [index for index, text in enumerate(wanted) if not text]
        if silent:
            raise RewardError(
                f"prompt {prompts[silent[0]]!r} has no text in double quotes; expected what the image should show, as "
                'in a sign that says "CAT"; reward such prompts only',
                indices=silent,
                batch_size=len(prompts),
            )
        scores = [similarity(read, text) for read, text in zip(self.read(images), wanted, strict=True)]
        return torch.tensor(scores, device=images.device)

    def version(self) -> str:
        """That of RapidOCR, which brings its weights, and of this file."""
        if self._engine is None:
            self._engine = _load()
        return f"rapidocr {metadata.version('rapidocr')}, {version_of(asked_text)}"

    def read(self, images: Images) -> list[str]:
        """What each image says, its pieces in the order of reading, without blanks and in small letters."""
        if self._engine is None:
            self._engine = _load()
        found = [self._engine(pixels[..., ::-1]).txts for pixels in to_pixels(images.detach().float())]
        return [_plain("".join(pieces or ())) for pieces in found]


def asked_text(prompt: str) -> str:
    """What stands in double quotes, without blanks and in small letters; empty where nothing does."""
    return _plain("".join(first or second for first, second in QUOTED.findall(prompt)))


def similarity(read: str, asked: str) -> float:
    """1 where `asked` is read, less its share of letters that would have to be changed, put in or taken out."""
    if asked in read:
        return 1.0
    return 1 - min(distance(read, asked), len(asked)) / len(asked)


def distance(one: str, other: str) -> int:
    """Levenshtein's: the fewest letters to change, put in or take out that make one text of the other."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != wanted))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _load() -> Any:
    threads = torch.get_num_threads()  # its own choice, every core, takes twice the time of one for a small image
    settings = {
        "Global.use_cls": False,  # that looks for scans that are upside down
        "Global.log_level": "error",
        "Det.limit_side_len": SHORTEST_EDGE,
        "Rec.rec_img_shape": list(LINE),
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    try:
        return import_module("rapidocr").RapidOCR(params=settings)
    except ImportError as error:
        raise InputError(f"the reward 'ocr' needs RapidOCR ({error}); pip install 'rpo[ocr]'") from error


OCR = OcrReward()
