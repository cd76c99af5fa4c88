"""How well an image would please, by LAION's aesthetic predictor v2: a CLIP embedding through five linear layers.

score = W5(W4(W3(W2(W1 e + b1) + b2) + b3) + b4) + b5,   e = unit CLIP image embedding

The head was fitted to people's marks from 1 to 10 for photographs and generated images (SAC, LOGOS, AVA); generated
images get about 4.5 to 7, higher is better, and the prompt does not matter: it says nothing of what is in the image.
Alone it is soon gamed. It is the reward of the paper of DDPO (arXiv:2305.13301) and of TRL's DDPO. The score is
differentiable in the image and float32 throughout.

CLIP is openai/clip-vit-large-patch14 (MIT), the head aesthetic-model.pth of trl-lib/ddpo-aesthetic-predictor, which is
LAION's sac+logos+ava1-l14-linearMSE.pth (Apache-2.0). Both take 1.7 GB, which "clip-score" in the same run shares.
"""

from collections.abc import Sequence
from os import PathLike
from typing import final

import torch
from torch import Tensor

from rpo.rewards.base import check_batch, check_range
from rpo.rewards.clip import CLIP_SCORE, ClipReward, clip_score
from rpo.rewards.version import version_of_weights
from rpo.rewards.weights import LinearHead, find_file, read_head, read_state
from rpo.types import Images, PerSample

HEAD_REPOSITORY = "trl-lib/ddpo-aesthetic-predictor"
HEAD_FILES = ("aesthetic-model.pth", "aesthetic-model.safetensors")
"""In a folder of one's own either will do."""


@final
class AestheticReward:
    """The mark that the head gives to the embedding of an image.

    Example:
        >>> AestheticReward(ClipReward("my/clip"), "my/head")
        AestheticReward(ClipReward('my/clip', scale=None), 'my/head')
    """

    is_differentiable = True

    def __init__(self, clip: ClipReward, head: str | PathLike[str]) -> None:
        """Say what embeds the images, and the folder or hub id of the head; nothing is loaded yet."""
        self.clip, self.source = clip, str(head)
        self._head: LinearHead | None = None

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        return f"AestheticReward({self.clip!r}, {self.source!r})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """One mark per image, with the gradient in the images; the prompts do not matter."""
        check_batch(images, prompts)
        check_range(images)
        embeddings = self.embed_images(images)
        head = self._head_for(embeddings.shape[1]).to(embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            return head(embeddings).to(images.device)

    def embed_images(self, images: Images) -> Tensor:
        """Unit embeddings [batch, dim], of the CLIP model."""
        return self.clip.embed_images(images)

    def version(self) -> str:
        """A hash of the weights of both, and of how images are prepared for them."""
        width = self.clip.embed_images(torch.zeros(1, 3, 64, 64)).shape[1]
        return version_of_weights({"head": self._head_for(width)}, clip=self.clip.version())

    def leave(self) -> None:
        """Have CLIP and head in the main memory until they are asked again."""
        self.clip.leave()
        if self._head is not None:
            self._head.to("cpu")

    def _head_for(self, width: int) -> LinearHead:
        if self._head is None:
            file = find_file(self.source, *HEAD_FILES)
            self._head = read_head(read_state(file), width, file)
        return self._head


def aesthetic(folder: str) -> AestheticReward:
    """The predictor of a folder or hub id that has a CLIP checkpoint and the head, as aesthetic-model.pth."""
    return AestheticReward(clip_score(folder), folder)


AESTHETIC = AestheticReward(CLIP_SCORE, HEAD_REPOSITORY)
