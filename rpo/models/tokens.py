"""What a CLIP text encoder is given of a caption: the tokens that fit into its context."""

from collections.abc import Callable, Hashable, Iterable
from os import PathLike

from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from rpo.errors import InputError
from rpo.models.captions import Kept, cut_captions
from rpo.models.packaged import folder_of

_MARKS = 2  # begin and end


def kept_tokens(tokenizer: CLIPTokenizer, convert: Callable[[str], str] | None = None) -> Kept:
    """A function from a caption to what of it is encoded, and whether that is less than all.

    Args:
        convert: What the pipeline does to a prompt first, such as spelling out learnt words.
    """
    room = tokenizer.model_max_length - _MARKS

    def kept(caption: str) -> tuple[Hashable, bool]:
        text = convert(caption) if convert is not None else caption
        if len(text.lower().encode()) < room:
            return text, False  # a token holds at least a byte, so that a short caption needs no tokenizer
        tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return tuple(tokens[:room]), len(tokens) > room

    return kept


def count_cut(pipe: StableDiffusionPipeline, captions: Iterable[str]) -> str:
    """How many captions a pipeline's text encoder cuts, in a sentence; empty if none."""
    tokenizer = pipe.tokenizer
    kept = kept_tokens(tokenizer, lambda caption: pipe.maybe_convert_prompt(caption, tokenizer))
    return str(cut_captions(captions, kept, f"the {tokenizer.model_max_length} tokens of the text encoder"))


def load_tokenizer(source: str | PathLike[str]) -> CLIPTokenizer:
    """The tokenizer of a checkpoint, without its weights."""
    try:
        return CLIPTokenizer.from_pretrained(folder_of(source), subfolder="tokenizer")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{source} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); expected a diffusers folder "
            "or hub id of Stable Diffusion; correct --model"
        ) from error
