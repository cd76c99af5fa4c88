"""Any `image-text-to-text` model of transformers on this machine: greedy by default, several questions in one forward.

Prompts of a batch are padded on the left, so that every answer starts right after its own prompt. Sampled answers are
drawn one by one from a generator of their own, made of the seed and the question, so that they do not depend on what
else is in the batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rpo.curation.components import hash_of_files
from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Fault
from rpo.curation.vlm.answers import AnswerCache
from rpo.curation.vlm.chat import Question, Reply
from rpo.devices import device_named
from rpo.errors import InputError
from rpo.randomness import keyed_generator


class LocalChat:
    """A vision-language model in memory; one batch at a time."""

    batch_size: int
    concurrency: int = 1
    identity: Mapping[str, str]
    is_held_to_schema: bool = False

    def __init__(self, config: ChatConfig, cache: AnswerCache) -> None:
        """Load a model and its processor.

        Args:
            config: Model (a folder or hub id), device, dtype and decoding.
        """
        self._max_tokens, self._temperature, self._seed = _decoding(config)
        self._device = device_named(config.device)
        self._processor, self._model = load_model(config, self._device)
        self.batch_size = config.batch_size
        self.identity = {
            "kind": "local",
            "model": config.model,
            "revision": _revision(config.model, self._model.config),
            "dtype": str(self._model.dtype),
            "max_tokens": str(self._max_tokens),
            "temperature": str(self._temperature),
            "seed": str(self._seed),
        }
        self._cache = cache

    def __call__(self, questions: Sequence[Question]) -> list[Reply | Fault]:
        """Answer all questions in one batch, those apart that were answered before."""
        known = [self._cache.load(self.identity, question) for question in questions]
        new = [question for question, reply in zip(questions, known, strict=True) if reply is None]
        answers = iter(self._answer(new) if new else ())
        return [reply or next(answers) for reply in known]

    def to(self, device: torch.device) -> None:
        """Have the model on another device, where it is not there yet."""
        if self._model.device != device:
            self._model.to(device)
            self._device = device

    def _answer(self, questions: list[Question]) -> list[Reply]:
        if self._temperature == 0:
            replies = self._generate(questions)
        else:
            replies = [self._sample(question) for question in questions]
        for question, reply in zip(questions, replies, strict=True):
            self._cache.save(self.identity, question, reply)
        return replies

    def _sample(self, question: Question) -> Reply:
        pixels = hashlib.sha256(b"".join(image.tobytes() for image in question.images)).hexdigest()
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(keyed_generator(self._seed, pixels, question.text).initial_seed())
            return self._generate([question])[0]

    @torch.inference_mode()
    def _generate(self, questions: list[Question]) -> list[Reply]:
        inputs = self._processor.apply_chat_template(
            [conversation(question) for question in questions],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._device, self._model.dtype)
        temperature = self._temperature
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        tokens = self._model.generate(**inputs, max_new_tokens=self._max_tokens, **sampling)
        written = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        return [Reply(text, is_cut=self._is_cut(row)) for text, row in zip(texts, written, strict=True)]

    def _is_cut(self, written: torch.Tensor) -> bool:
        ends = self._model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        return len(written) >= self._max_tokens and not torch.isin(written.cpu(), torch.tensor(ends)).any()


def _decoding(config: ChatConfig) -> tuple[int, float, int]:
    """Longest answer, temperature and seed, all of which a model on this machine needs."""
    if config.max_tokens is None or config.temperature is None or config.seed is None:
        raise InputError(
            f"a local model is to be asked, with max_tokens {config.max_tokens}, temperature {config.temperature} and "
            f"seed {config.seed}; expected a number for each; only a server can be left to choose"
        )
    return config.max_tokens, config.temperature, config.seed


def load_model(config: ChatConfig, device: torch.device) -> tuple[Any, Any]:
    """The processor and the model that a configuration names."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not config.model:
        raise InputError("a local model is to be asked, but model is empty; give its folder or hub id")
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        processor = AutoProcessor.from_pretrained(config.model)
        model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"'{config.model}' does not load as an image-text-to-text model of transformers: {error}"
        ) from error
    tokenizer = vars(processor).get("tokenizer")
    if tokenizer is None or not processor.chat_template:
        raise InputError(
            f"'{config.model}' has no chat template or tokenizer in its processor, so it cannot be asked in turns; "
            "use an instruction-tuned checkpoint"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor, model.to(device).eval()


def conversation(question: Question) -> list[dict[str, Any]]:
    """A question as a chat template takes it."""
    images = [{"type": "image", "image": image} for image in question.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}]


def _revision(source: str, config: Any) -> str:
    """The commit of a model from the Hub, or the sha256 of all files of a folder."""
    return hash_of_files(Path(source)) if Path(source).is_dir() else str(config._commit_hash)
