"""Grounding DINO (arXiv:2303.05499) as a detector: all names in one text, "apple. traffic light.".

confidence of a name at a box = mean over the tokens of the name of sigmoid(logit of box and token)

That is how the authors count classes; a box belongs to the name that it fits best. IDEA-Research/grounding-dino-tiny
(Apache-2.0) takes 0.7 GB, in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.rewards.detector import check_length

ENDS = ".?"
"""What ends a name, to the model."""


@dataclass(frozen=True)
class GroundingDino:
    """The model in memory."""

    processor: Any
    model: Any
    threshold: float = 0.25

    def ask(self, picture: Any, names: list[str], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, confidences and places of the names, of what is above the threshold."""
        for name in names:
            if any(end in name for end in ENDS):
                raise InputError(f"{name!r} is asked for, with . or ? in it; expected a name; leave these out")
        text = " ".join(f"{name.lower()}." for name in names)
        inputs = self.processor(text=text, images=picture, return_tensors="pt").to(self.model.device)
        check_length(text, inputs.input_ids.shape[1], self.model.config.max_text_len)
        said = self.model(**inputs)
        chances, first, of_names = said.logits[0].sigmoid(), 1, list[Tensor]()  # the first token is no word
        for name in names:
            after = first + len(self.processor.tokenizer(name.lower(), add_special_tokens=False).input_ids)
            of_names.append(chances[:, first:after].mean(dim=1))
            first = after + 1
        best, labels = torch.stack(of_names, dim=1).max(dim=1)
        there = best > threshold
        centre, size = said.pred_boxes[0].split(2, dim=1)
        scale = torch.tensor([picture.width, picture.height] * 2, device=best.device)
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1) * scale
        return boxes[there], best[there], labels[there]
