"""The sizes that a run over pairs trains at: one canvas for all, or the buckets that its settings ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rpo.data.buckets import Buckets, make_buckets, one_bucket
from rpo.data.encodings import original_request
from rpo.data.preference import PairSet
from rpo.data.transform import PairTransform, TransformDraw
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.process.diffusion import diffusion_of
from rpo.trainers.dpo_config import DPOConfig
from rpo.types import Canvas, Images


@dataclass(frozen=True)
class Sizes:
    """What a run trains at."""

    canvas: Canvas
    """The nominal one: of the largest area, for which beta is said, and at which previews are drawn."""
    num_dims: int
    """Dimensions of one latent of it."""
    buckets: Buckets
    notes: list[str]
    """What a plan has to say of buckets."""

    def first_originals(self, pairs: PairSet, prompts: Sequence[str]) -> Images | None:
        """The image that the first pair of each prompt edits, cut to the canvas; None where pairs are no edits."""
        first = {pair.prompt: pair for pair in reversed(pairs.pairs)}
        edited = [first[prompt] for prompt in prompts if first[prompt].original is not None]
        found = [original_request(one, PairTransform(self.canvas), TransformDraw()).load() for one in edited]
        return torch.stack(found) if found else None


def sizes_of(model: Checkpoint, pairs: PairSet, config: DPOConfig, at_once: int) -> Sizes:
    """The sizes of a run; refuses a step that the checkpoint cannot take.

    Args:
        at_once: Pairs in the micro-batches of all processes, which are of one bucket.
    """
    canvas, step, unit = model.canvas_of(config.resolution), config.bucket_step, model.side_unit
    num_dims = diffusion_of(model.prediction_type).num_dims(model.latent_shape(canvas))
    if step is None:
        return Sizes(canvas, num_dims, one_bucket(len(pairs), canvas), [])
    if step % unit or step > min(canvas):
        raise InputError(
            f"bucket_step is {step}, but the sides of an image have to be multiples of {unit} for this checkpoint, and "
            f"no bucket is larger than {canvas}; give a multiple of {unit}, at most {min(canvas)}"
        )
    buckets = make_buckets(pairs, canvas, step)
    return Sizes(canvas, num_dims, buckets, buckets.notes(at_once))
