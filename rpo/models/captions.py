"""How many captions are longer than what a text encoder takes, and which of them are the same to it.

What is cut off is never trained on, and captions that differ only there train as one.
"""

from collections.abc import Callable, Hashable, Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any

from rpo.errors import InputError
from rpo.models.packaged import folder_of

if TYPE_CHECKING:
    from rpo.models.base import TextContext

# The libraries are imported where they are used: words are counted without torch.

CLIP_TOKENS = 77
"""Context of CLIP's text encoder, its two marks included; a word takes at least one token."""

_MARKS = 2

Kept = Callable[[str], tuple[Hashable, bool]]
"""From a caption to what of it is encoded, and whether that is less than all."""


def cut_captions(captions: Iterable[str], kept: Kept, limit: str) -> str:
    """How many captions are cut by a limit, in a sentence; empty if none is."""
    distinct = set(captions)
    seen: dict[Hashable, int] = {}
    cut: list[Hashable] = []
    for caption in distinct:
        key, is_cut = kept(caption)
        seen[key] = seen.get(key, 0) + 1
        cut += [key] if is_cut else []
    merged = sum(seen[key] > 1 for key in cut)
    equal = f", and {merged} of them became equal to another" if merged else ""
    return f"{len(cut)} of {len(distinct)} captions are too long for {limit} and are cut{equal}" if cut else ""


def surely_cut(captions: Iterable[str]) -> str:
    """The captions that CLIP cuts whatever its tokenizer makes of them: those of more words than it takes tokens."""
    room = CLIP_TOKENS - _MARKS

    def kept(caption: str) -> tuple[Hashable, bool]:
        words = caption.split()
        return tuple(words[:room]), len(words) > room

    return cut_captions(captions, kept, f"the {CLIP_TOKENS} tokens of CLIP (at least; --model counts them)")


def kept_tokens(tokenizer: Any, max_length: int, convert: Callable[[str], str] = str) -> Kept:
    """What a tokenizer keeps of a caption, marks included in the length.

    Args:
        convert: What the pipeline does to a prompt first, such as spelling out learnt words.
    """
    room = max_length - tokenizer.num_special_tokens_to_add()

    def kept(caption: str) -> tuple[Hashable, bool]:
        text = convert(caption)
        if len(text.lower().encode()) < room:
            return text, False  # a token holds at least a byte, so that a short caption needs no tokenizer
        tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return tuple(tokens[:room]), len(tokens) > room

    return kept


def count_cut(pipe: Any, context: "TextContext", captions: Iterable[str]) -> str:
    """How many captions a pipeline's text encoders cut, in a sentence; refused where a cut one is an error."""
    from diffusers.loaders import TextualInversionLoaderMixin

    captions, knows_words = list(captions), isinstance(pipe, TextualInversionLoaderMixin)
    convert = (lambda caption: pipe.maybe_convert_prompt(caption, context.tokenizer)) if knows_words else str
    kept = kept_tokens(context.tokenizer, context.max_length, convert)
    cut = next((caption for caption in captions if kept(caption)[1]), None) if context.refuses_longer else None
    if cut is not None:
        raise InputError(
            f"a prompt is longer than the {context.max_length} tokens that this checkpoint reads without its third "
            f"text encoder (T5), and the rest would have no effect: {cut[:60]!r}…; shorten it, or load the checkpoint "
            "with T5"
        )
    return cut_captions(captions, kept, f"the {context.max_length} tokens of the text encoder")


def load_tokenizer(source: str | PathLike[str]) -> Any:
    """The tokenizer of a checkpoint, without its weights."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder_of(source), subfolder="tokenizer")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{source} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); expected a diffusers folder "
            "or hub id of Stable Diffusion; correct --model"
        ) from error
