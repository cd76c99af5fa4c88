"""What the network is told in training of a pair: its caption, and what it is shown of the image that its sides edit.

Text encoders of some editors see that image, too: then a caption is encoded anew for each image, the empty one as well.
"""

from collections.abc import Sequence
from typing import final

from rpo.data.encodings import EmbeddingCache, InstructionRequest, LatentRequest, TextRequest
from rpo.devices import uploaded
from rpo.models.base import ORIGINAL
from rpo.models.checkpoint import Checkpoint
from rpo.types import Conditioning, Latents


@final
class PairConditions:
    """Makes the conditioning of a micro-batch; originals are none, or one for each caption."""

    def __init__(self, model: Checkpoint, embeddings: EmbeddingCache) -> None:
        """Take what encodes, and what keeps it."""
        self._model, self._embeddings = model, embeddings

    def of(self, captions: Sequence[str], originals: Sequence[LatentRequest], latents: Latents) -> Conditioning:
        """What captions say, and what is shown of the originals, whose latents' means are given."""
        count, device = len(captions), self._model.device
        nothing = [""] * (count if self._sees(originals) else 1)
        texts = [*self.requests(captions, originals), *self.requests(nothing, originals)]
        embeds = {name: uploaded(one, device) for name, one in self._embeddings.embed(texts).items()}
        shown = {ORIGINAL: self._model.shown(uploaded(latents, device))} if originals else {}
        return Conditioning(
            {name: one[:count] for name, one in embeds.items()} | shown,
            {name: one[count:].expand(count, *one.shape[1:]) for name, one in embeds.items()} | shown,
        )

    def requests(self, captions: Sequence[str], originals: Sequence[LatentRequest]) -> list[TextRequest]:
        """What is asked of the text encoders."""
        if not self._sees(originals):
            return list(captions)
        return [InstructionRequest(*one) for one in zip(captions, originals, strict=True)]

    def prefetch(self, requests: Sequence[TextRequest]) -> None:
        """Encode what is not kept yet."""
        self._embeddings.prefetch(requests)

    def _sees(self, originals: Sequence[LatentRequest]) -> bool:
        return bool(originals) and self._model.family.text_sees
