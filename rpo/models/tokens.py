"""What a text encoder is given of a caption: the tokens that fit into its context."""

from collections.abc import Callable, Hashable, Iterable
from os import PathLike
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTokenizer

from rpo.errors import InputError
from rpo.models.base import TextContext
from rpo.models.captions import Kept, cut_captions
from rpo.shapes import path as shapes_path


def kept_tokens(tokenizer: Any, max_length: int, convert: Callable[[str], str] | None = None) -> Kept:
    """A function from a caption to what of it is encoded, and whether that is less than all.

    Args:
        max_length: Tokens that are encoded, marks included.
        convert: What the pipeline does to a prompt first, such as spelling out learnt words.
    """
    room = max_length - tokenizer.num_special_tokens_to_add()

    def kept(caption: str) -> tuple[Hashable, bool]:
        text = convert(caption) if convert is not None else caption
        if len(text.lower().encode()) < room:
            return text, False  # a token holds at least a byte, so that a short caption needs no tokenizer
        tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return tuple(tokens[:room]), len(tokens) > room

    return kept


def count_cut(pipe: Any, context: TextContext, captions: Iterable[str]) -> str:
    """How many captions a pipeline's text encoders cut, in a sentence; empty if none."""
    return str(cut_captions(captions, _kept_by(pipe, context), f"the {context.max_length} tokens of the text encoder"))


def refuse_cut(pipe: Any, context: TextContext, captions: Iterable[str]) -> None:
    """Refuse a caption that would be cut."""
    kept = _kept_by(pipe, context)
    for caption in captions:
        if kept(caption)[1]:
            raise InputError(
                f"a prompt is longer than the {context.max_length} tokens that this checkpoint reads without its third "
                f"text encoder (T5), and the rest would have no effect: {caption[:60]!r}…; shorten it, or load the "
                "checkpoint with T5"
            )


def _kept_by(pipe: Any, context: TextContext) -> Kept:
    knows_words = isinstance(pipe, TextualInversionLoaderMixin)
    convert = (lambda caption: pipe.maybe_convert_prompt(caption, context.tokenizer)) if knows_words else None
    return kept_tokens(context.tokenizer, context.max_length, convert)


def load_tokenizer(source: str | PathLike[str]) -> CLIPTokenizer:
    """The tokenizer of a checkpoint, without its weights."""
    folder = shapes_path() if source == "shapes" else source
    try:
        return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{source} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); expected a diffusers folder "
            "or hub id of Stable Diffusion; correct --model"
        ) from error
