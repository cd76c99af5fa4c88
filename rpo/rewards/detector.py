"""Things in an image by their names, found by an open-vocabulary detector of transformers.

Of what is above a threshold, boxes of one name that overlap a surer one by more than half (intersection over union) are
the same thing. What is left is listed surest first. Thresholds and overlap are usual values: they were not fitted to
anything here.

OWLv2 (arXiv:2306.09683): every place of the image is asked for every name, "a photo of a NAME"; it belongs to the name
that it fits best, with confidence sigmoid(logit). google/owlv2-base-patch16-ensemble (Apache-2.0) takes 0.6 GB, in
float32. Grounding DINO is in `rpo.rewards.grounding_dino`. Which of the two a checkpoint is, its configuration says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from PIL import Image
from torch import Tensor

from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.plugins import load_plugin
from rpo.rewards.version import version_of_weights
from rpo.types import Images

DETECTOR = "google/owlv2-base-patch16-ensemble"
TEMPLATE = "a photo of a {}"
OVERLAP = 0.5
READERS = {"owlv2": "rpo.rewards.detector:Owlv2", "grounding-dino": "rpo.rewards.grounding_dino:GroundingDino"}
"""What reads a checkpoint of that `model_type`."""


@dataclass(frozen=True)
class Thing:
    """Something that was found."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in pixels."""
    confidence: float


Found = dict[str, list[Thing]]
"""Things by the name that was asked for, surest first; every name has a list."""


class Detector(Protocol):
    """What finds things."""

    def __call__(self, images: Images, names: Sequence[Sequence[str]]) -> list[Found]:
        """What is found in each image of its own names."""
        ...

    def leave(self) -> None:
        """Go to the main memory until the next question."""
        ...


class Loaded(Protocol):
    """A detector in memory."""

    processor: Any
    model: Any
    threshold: float
    """A usual one."""

    def ask(self, picture: Any, names: list[str], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [things, 4] in pixels, confidences and places of the names, of what is above the threshold."""
        ...


@final
class OpenVocabularyDetector:
    """The detector of a folder or hub id.

    Example:
        >>> OpenVocabularyDetector("my/owl")
        OpenVocabularyDetector('my/owl')
    """

    def __init__(self, source: str, *, threshold: float | None = None, overlap: float = OVERLAP) -> None:
        """Say which, and above which confidence something is there: None for the usual one; nothing is loaded yet."""
        self.source, self.threshold, self.overlap = source, threshold, overlap
        self._loaded: Loaded | None = None

    def __repr__(self) -> str:
        """What decides the answers, as it would be written."""
        return f"OpenVocabularyDetector({self.source!r})"

    @torch.no_grad()
    def __call__(self, images: Images, names: Sequence[Sequence[str]]) -> list[Found]:
        """What is found in each image of its own names."""
        loaded = self._in_memory()
        loaded.model.to(images.device)
        pixels = to_pixels(images.detach().float())
        with torch.autocast(images.device.type, enabled=False):
            return [self._one(loaded, one, list(asked)) for one, asked in zip(pixels, names, strict=True)]

    def version(self) -> str:
        """A hash of the weights and of all else that decides what is found."""
        loaded = self._in_memory()
        return version_of_weights(
            {"detector": loaded.model},
            vocabulary=sorted(loaded.processor.tokenizer.get_vocab().items()),
            preprocess=loaded.processor.image_processor.to_dict(),
            threshold=self._threshold(loaded),
            overlap=self.overlap,
        )

    def leave(self) -> None:
        """Have the model in the main memory until it is asked again."""
        if self._loaded is not None:
            self._loaded.model.to("cpu")

    def _in_memory(self) -> Loaded:
        if self._loaded is None:
            self._loaded = _load(self.source)
        return self._loaded

    def _threshold(self, loaded: Loaded) -> float:
        return loaded.threshold if self.threshold is None else self.threshold

    def _one(self, loaded: Loaded, pixels: Any, names: list[str]) -> Found:
        every, confidences, labels = loaded.ask(Image.fromarray(pixels), names, self._threshold(loaded))
        found: Found = {name: [] for name in names}
        for index, name in enumerate(names):
            own = labels == index
            kept = apart(every[own], confidences[own], overlap=self.overlap)
            boxes, scores = every[own][kept].tolist(), confidences[own][kept].tolist()
            found[name] = [Thing(tuple(box), score) for box, score in zip(boxes, scores, strict=True)]
        return found


@dataclass(frozen=True)
class Owlv2:
    """OWLv2 in memory."""

    processor: Any
    model: Any
    threshold: float = 0.2

    def ask(self, picture: Any, names: list[str], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, confidences and places of the names, of what is above the threshold."""
        texts = [TEMPLATE.format(name) for name in names]
        most = self.model.config.text_config.max_position_embeddings
        for text in texts:
            check_length(text, len(self.processor.tokenizer(text).input_ids), most)
        inputs = self.processor(text=[texts], images=picture, return_tensors="pt").to(self.model.device)
        (said,) = self.processor.post_process_grounded_object_detection(
            outputs=self.model(**inputs), threshold=threshold, target_sizes=[(picture.height, picture.width)]
        )
        return said["boxes"], said["scores"], said["labels"]


def check_length(text: str, tokens: int, most: int) -> None:
    """Refuse a text that a detector would cut."""
    if tokens > most:
        raise InputError(f"{text!r} has {tokens} tokens, the detector takes {most}; call the things something shorter")


def apart(boxes: Tensor, scores: Tensor, *, overlap: float) -> list[int]:
    """Which boxes stand for a thing of their own, surest first: none overlaps a surer one by more than this."""
    kept = list[int]()
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(_overlap(boxes[index], boxes[other]) <= overlap for other in kept):
            kept.append(index)
    return kept


def _overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union."""
    inner = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp(min=0).prod()
    union = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - inner
    return (inner / union).item() if union > 0 else 0.0


def _load(source: str) -> Loaded:
    from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in READERS:
            raise InputError(f"its configuration says model_type {kind!r}")
        processor = AutoProcessor.from_pretrained(source)
        model, info = AutoModelForZeroShotObjectDetection.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            raise InputError(f"it lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"no detector can be made of {source!r}: {error}; expected a folder or hub id with OWLv2 or Grounding "
            "DINO and its processor; give another one, or download it where there is a network"
        ) from error
    return load_plugin(kind, READERS, "detector")(processor, model.eval().requires_grad_(False))
