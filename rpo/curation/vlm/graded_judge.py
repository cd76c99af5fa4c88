"""A vision-language model that grades images: asked for a reason and a whole number from 0 to 10.

score = grade / 10

Any `image-text-to-text` model of transformers on this machine, or any model behind an OpenAI-compatible server:

    graded-judge:FOLDER    graded-judge:owner/name    graded-judge:http://HOST:PORT/v1#MODEL

It is asked for its likeliest answer, by rpo/curation/prompts/grade.txt, and the answer is checked as those of critics
are: one JSON object of this form and nothing guessed. An answer that is none is a score that failed, with what was
said. A server that is away ends the run, which resumes. Grades are coarse, and images of one prompt often get the same:
with few images per prompt there is little to learn from.
"""

from collections.abc import Sequence
from typing import Annotated, Any, final

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Fault
from rpo.curation.vlm.answers import AnswerCache, understand
from rpo.curation.vlm.asking import asked_by_name, load_chat
from rpo.curation.vlm.chat import Chat, Question
from rpo.curation.vlm.local import LocalChat
from rpo.curation.vlm.prompts import PromptFile
from rpo.curation.vlm.vqa_score import CHECKPOINT
from rpo.data.pixels import to_pixels
from rpo.rewards.answers import FAILURE
from rpo.rewards.base import check_batch, check_range
from rpo.types import Images

BEST = 10
MAX_TOKENS = 300


class Grade(BaseModel):
    """What is answered; the reason comes first, so that it is there before the grade is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: Annotated[str, StringConstraints(max_length=1000)]
    grade: Annotated[int, Field(ge=0, le=BEST)]


@final
class GradedJudge:
    """The grades of one model.

    Example:
        >>> GradedJudge("http://localhost:8000/v1#qwen")
        GradedJudge('http://localhost:8000/v1#qwen')
    """

    is_differentiable = False

    def __init__(self, model: str) -> None:
        """Say which model, or the address of a server and its name there; nothing is asked yet."""
        self.source = model
        self._asks: dict[str, Any] = {"max_tokens": MAX_TOKENS, "batch_size": 4, "cache": False}
        self._asks |= asked_by_name(model, "graded-judge")
        self._prompt = PromptFile.load("grade", "", variables=("caption",))
        self._chat: Chat | None = None

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        return f"GradedJudge({self.source!r})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> tuple[list[float], dict[str, Any]]:
        """A tenth of the grade of every image; NaN, and why, where the answer is none."""
        check_batch(images, prompts)
        check_range(images)
        chat = self._chat_on(images.device)
        shown = None if chat.is_held_to_schema else Grade
        pictures = [Image.fromarray(pixels) for pixels in to_pixels(images.detach().float())]  # pyright: ignore
        questions = [
            Question(self._prompt.render({"caption": str(prompt)}, answer=shown), (picture,), Grade)
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        size = chat.batch_size if chat.concurrency == 1 else len(questions)
        replies = [one for start in range(0, len(questions), size) for one in chat(questions[start : start + size])]
        found = [one if isinstance(one, Fault) else understand(one, Grade) for one in replies]
        scores = [torch.nan if isinstance(one, Fault) else one.grade / BEST for one in found]
        whys = [f"{one.message} (it said {one.raw[:200]!r})" if isinstance(one, Fault) else None for one in found]
        return scores, {FAILURE: whys}

    def version(self) -> str:
        """Files or commit of a model of this machine, of a server the name alone; and how it is asked."""
        told = self._chat_on(torch.device("cpu")).identity
        which = f"model {told['model']} of a server" if told["kind"] == "server" else f"weights {told['revision'][:16]}"
        return f"{which}, prompt {self._prompt.sha256[:16]}"

    def leave(self) -> None:
        """Have a model of this machine in the main memory until it is asked again."""
        if isinstance(self._chat, LocalChat):
            self._chat.to(torch.device("cpu"))

    def _chat_on(self, device: torch.device) -> Chat:
        if self._chat is None:
            self._chat = load_chat(ChatConfig(**{**self._asks, "device": str(device)}), AnswerCache(None))
        if isinstance(self._chat, LocalChat):
            self._chat.to(device)
        return self._chat


GRADED_JUDGE = GradedJudge(CHECKPOINT)
