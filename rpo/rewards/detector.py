"""Things in an image by their names: OWLv2 (arXiv:2306.09683), an open-vocabulary detector of transformers.

Every place of the image is asked for every name, "a photo of a NAME"; it belongs to the name that it fits best, with
confidence sigmoid(logit). Of what is above the threshold, boxes of one name that overlap a surer one by more than half
(intersection over union) are the same thing. What is left is listed surest first.

google/owlv2-base-patch16-ensemble (Apache-2.0) takes 0.6 GB, in float32. Threshold and overlap are usual values: they
were not fitted to anything here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from PIL import Image
from torch import Tensor

from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.rewards.version import version_of_weights
from rpo.types import Images

DETECTOR = "google/owlv2-base-patch16-ensemble"
TEMPLATE = "a photo of a {}"
THRESHOLD, OVERLAP = 0.2, 0.5


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


@final
class Owlv2Detector:
    """OWLv2 of a folder or hub id.

    Example:
        >>> Owlv2Detector("my/owl")
        Owlv2Detector('my/owl')
    """

    def __init__(self, source: str, *, threshold: float = THRESHOLD, overlap: float = OVERLAP) -> None:
        """Say which; nothing is loaded yet."""
        self.source, self.threshold, self.overlap = source, threshold, overlap
        self._loaded: tuple[Any, Any] | None = None

    def __repr__(self) -> str:
        """What decides the answers, as it would be written."""
        return f"Owlv2Detector({self.source!r})"

    @torch.no_grad()
    def __call__(self, images: Images, names: Sequence[Sequence[str]]) -> list[Found]:
        """What is found in each image of its own names."""
        if self._loaded is None:
            self._loaded = _load(self.source)
        processor, model = self._loaded
        model.to(images.device)
        pixels = to_pixels(images.detach().float())
        with torch.autocast(images.device.type, enabled=False):
            return [self._one(processor, model, one, list(asked)) for one, asked in zip(pixels, names, strict=True)]

    def version(self) -> str:
        """A hash of the weights and of all else that decides what is found."""
        if self._loaded is None:
            self._loaded = _load(self.source)
        processor, model = self._loaded
        return version_of_weights(
            {"owl": model},
            vocabulary=sorted(processor.tokenizer.get_vocab().items()),
            preprocess=processor.image_processor.to_dict(),
            threshold=self.threshold,
            overlap=self.overlap,
        )

    def leave(self) -> None:
        """Have the model in the main memory until it is asked again."""
        if self._loaded is not None:
            self._loaded[1].to("cpu")

    def _one(self, processor: Any, model: Any, pixels: Any, names: list[str]) -> Found:
        picture, texts = Image.fromarray(pixels), [TEMPLATE.format(name) for name in names]
        most = model.config.text_config.max_position_embeddings
        for name, text in zip(names, texts, strict=True):
            if (tokens := len(processor.tokenizer(text).input_ids)) > most:
                raise InputError(
                    f"{text!r} has {tokens} tokens, the detector takes {most}; call {name!r} something shorter"
                )
        inputs = processor(text=[texts], images=picture, return_tensors="pt").to(model.device)
        (said,) = processor.post_process_grounded_object_detection(
            outputs=model(**inputs), threshold=self.threshold, target_sizes=[pixels.shape[:2]]
        )
        found: Found = {name: [] for name in names}
        for index, name in enumerate(names):
            own = said["labels"] == index
            kept = apart(said["boxes"][own], said["scores"][own], overlap=self.overlap)
            boxes, scores = said["boxes"][own][kept].tolist(), said["scores"][own][kept].tolist()
            found[name] = [Thing(tuple(box), score) for box, score in zip(boxes, scores, strict=True)]
        return found


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


def _load(source: str) -> tuple[Any, Any]:
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    try:
        processor = Owlv2Processor.from_pretrained(source)
        model, info = Owlv2ForObjectDetection.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise InputError(f"it lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"no detector can be made of {source!r}: {error}; expected a folder or hub id with OWLv2 and its "
            "processor; give another one, or download it where there is a network"
        ) from error
    return processor, model.eval().requires_grad_(False)
