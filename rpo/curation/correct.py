"""Self-correction: what a critic finds wrong is edited, as in the curation of pairs, but on what was just drawn.

    image → critique → instruction → edit

Whether the edit is better is for a judge to say (`rpo.sampling.select.corrected`).
"""

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from PIL import Image

from rpo.curation.faults import ask_each
from rpo.curation.records import Critic, Critique, Editor, Instructions, Instructor
from rpo.data.pixels import rgb, to_pixels
from rpo.randomness import keyed_generator
from rpo.types import Images


@final
class SelfCorrection:
    """From images to their edits, by three components of the curation.

    Attributes:
        edited: How many images were edited so far.
        faults: How many could not be criticised, instructed or edited, and were left as they are.
    """

    def __init__(self, critic: Critic, instructor: Instructor, editor: Editor, *, seed: int = 0):
        """Take who finds, tells and does.

        Args:
            seed: Of the edits' noise, which is a function of it, the round and the image's place.
        """
        self._critic, self._instructor, self._editor, self._seed = critic, instructor, editor, seed
        self.edited = self.faults = 0

    def __call__(self, images: Images, prompts: Sequence[str], number: int) -> Images:
        """What was made of each image: itself where nothing is wrong, or nobody could say or do anything about it.

        Args:
            images: RGB in [0, 1], one per prompt.
            number: Of the round.

        Raises:
            Unavailable: A component cannot answer now.
        """
        shown = [Image.fromarray(pixels) for pixels in to_pixels(images)]
        rows = list(range(len(shown)))
        found = ask_each(lambda some: self._critic([shown[k] for k in some], [prompts[k] for k in some]), rows)
        wrong = [(k, one) for k, one in enumerate(found) if isinstance(one, Critique) and one.problems]
        told = ask_each(
            lambda some: self._instructor(
                [shown[k] for k, _ in some], [prompts[k] for k, _ in some], [critique for _, critique in some]
            ),
            wrong,
        )
        jobs = [
            (k, one.text)
            for (k, _), one in zip(wrong, told, strict=True)
            if isinstance(one, Instructions) and not one.is_empty
        ]
        seeds = {k: keyed_generator("correction", self._seed, number, k).initial_seed() for k, _ in jobs}
        edits = ask_each(
            lambda some: self._editor(
                [shown[k] for k, _ in some], [text for _, text in some], [seeds[k] for k, _ in some]
            ),
            jobs,
        )
        corrected = images.clone()
        for (k, _), edit in zip(jobs, edits, strict=True):
            if isinstance(edit, Image.Image):
                pixels = torch.from_numpy(np.asarray(rgb(edit)).copy())
                corrected[k] = (pixels.permute(2, 0, 1).float() / 255).to(images)
                self.edited += 1
        self.faults += (
            len(rows)
            + len(wrong)
            + len(jobs)
            - sum(isinstance(one, Critique | Instructions | Image.Image) for one in (*found, *told, *edits))
        )
        return corrected
