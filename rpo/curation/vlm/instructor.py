"""A vision-language model as instructor: a call and a prompt of its own; it sees image, caption and critique.

What it says must be orders. Verbs are an open class: a list of allowed ones would refuse "desaturate the sky". What an
order does not begin with is a closed one: articles, pronouns, auxiliaries, question words and negations. So a sentence
is refused that begins with one of these, whose subject is followed by an auxiliary ("the" left out: "dog is missing"),
that asks, or that only forbids. What is left may still be no order ("missing dog"): the score of the edit decides about
that, not a grammar.
"""

import json
import re
from collections.abc import Sequence
from typing import final

from PIL.Image import Image

from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Critique, Fault, Instructions
from rpo.curation.vlm.answers import AnswerCache
from rpo.curation.vlm.asking import Asking, load_chat
from rpo.curation.vlm.prompts import PromptFile

_DETERMINERS = {"a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "all", "both"}
_PRONOUNS = {"i", "you", "he", "she", "it", "we", "they", "there", "here", "my", "your", "his", "her", "its", "their"}
_QUESTIONS = {"what", "which", "who", "whose", "where", "when", "why", "how"}
_NUMBERS = {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}
_BEING = {"is", "are", "was", "were", "am", "isn't", "aren't", "has", "have", "had", "looks", "seems", "appears"}
_MODALS = {"can", "could", "should", "would", "must", "may", "might", "will", "shall", "needs", "ought"}
_AUXILIARIES = _BEING | _MODALS
_NEGATIONS = {"no", "not", "don't", "never", "without", "avoid", "none", "neither", "nothing"}
_RELATIVES = {"what", "that", "which", "who", "whose", "where"}
_SUBJECT_WORDS = 4  # "red circle left is missing": an auxiliary this early has the words before it as its subject


@final
class VlmInstructor(Asking):
    """Asks a model what an editor should do to images."""

    def __call__(
        self, images: Sequence[Image], captions: Sequence[str], critiques: Sequence[Critique]
    ) -> list[Instructions | Fault]:
        """Instructions for each image."""
        values = [
            {"caption": caption, "critique": json.dumps(critique.model_dump(mode="json"), ensure_ascii=False)}
            for caption, critique in zip(captions, critiques, strict=True)
        ]
        answers = self._ask([(image,) for image in images], values, Instructions)
        return [answer if isinstance(answer, Fault) else check_commands(answer) for answer in answers]


def vlm_instructor(config: ChatConfig, answers: AnswerCache) -> VlmInstructor:
    """The instructor behind a server or on this machine, as the configuration's kind says."""
    prompt = PromptFile.load("instruct", config.prompt, variables=("caption", "critique"))
    return VlmInstructor(load_chat(config, answers), prompt)


def check_commands(instructions: Instructions, raw: str = "") -> Instructions | Fault:
    """The instructions as they are, or what is wrong with the first that is no order."""
    for text in instructions.instructions:
        if problem := why_no_command(text):
            message = f"the instruction {text!r} {problem}; expected an order such as 'add a second cat'"
            return Fault("invalid", message, raw=raw or instructions.text)
    return instructions


def why_no_command(text: str) -> str:
    """Why a sentence cannot be an order to an editor; empty if it can be.

    Example:
        >>> why_no_command("desaturate the sky"), why_no_command("the sky is too blue")
        ('', "begins with 'the', so it is no order")
    """
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower().replace("’", "'"))
    if words[:1] == ["please"]:
        words = words[1:]
    if not words:
        return "has no words"
    if text.rstrip().endswith("?"):
        return "is a question"
    if words[0] in _NEGATIONS or words[:2] == ["do", "not"]:
        return "only says what shall not be"
    if words[0].isdigit() or words[0] in _DETERMINERS | _PRONOUNS | _QUESTIONS | _NUMBERS | _AUXILIARIES:
        return f"begins with {words[0]!r}, so it is no order"
    for index, word in enumerate(words[1:_SUBJECT_WORDS], start=1):
        if word in _RELATIVES:
            break
        if word in _AUXILIARIES:
            return f"states something of {' '.join(words[:index])!r}, so it is no order"
    return ""
