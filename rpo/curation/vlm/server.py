"""Any OpenAI-compatible server (vLLM, SGLang, Ollama, a hosted one), asked by the `openai` SDK.

The SDK retries what may pass (no connection, timeout, 408, 409, 429, 5xx) with growing pauses; every try has a deadline
and a bound on its answer, and goes to no other place (`rpo.curation.vlm.bounded_http`). What is left is either the
server's fault or that of one question, and only another question can tell: if the server answers a small one, the first
becomes a `Fault` and the run goes on; if it does not, it is `Unavailable` and the run stops. The key is read from
OPENAI_API_KEY and from nowhere else; a server of one's own usually needs none.
"""

import asyncio
import base64
import io
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from typing import Any

import httpx2
import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from PIL import Image
from pydantic import BaseModel

from rpo.curation.curate_config import ChatConfig, check_address
from rpo.curation.records import Fault, Unavailable
from rpo.curation.vlm.answers import AnswerCache, answer_schema
from rpo.curation.vlm.bounded_http import BoundedTransport, OversizedError, RefusedError
from rpo.curation.vlm.chat import Question, Reply
from rpo.errors import InputError
from rpo.from_environment import as_written

_REFUSES_EVERYBODY = (401, 403, 404, 429)  # no key, no right, no such model or address, too many requests
_OPTIONAL = ("max_tokens", "temperature", "seed")  # of the request; null in the configuration is not sent
_TOP_LOGPROBS = 20  # the most that the API gives
_MAY_PASS = 500  # from here on, and for a timeout, a question is asked once more


class _Sign(BaseModel):
    """Tells whether a server works."""

    ok: bool


_SMALL = Question('Answer with {"ok": true}.', (Image.new("RGB", (64, 64), (128, 128, 128)),), _Sign)


class ServerChat:
    """A model behind a server; safe to use from many threads."""

    batch_size: int
    concurrency: int
    identity: Mapping[str, str]
    is_held_to_schema: bool

    def __init__(self, config: ChatConfig, cache: AnswerCache, *, tells_first_tokens: bool = False) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            tells_first_tokens: Whether it is asked how likely the answer's first token was, and which others were.
        """
        if not config.model:
            raise InputError("a server is to be asked, but model is empty; give the name that the server knows it by")
        self._config, self._tells_first_tokens = config, tells_first_tokens
        self._client = _client(config)
        self._address = as_written(config.base_url or str(self._client.base_url))
        self._loop = _loop_of(os.getpid())
        self._slots = threading.BoundedSemaphore(config.concurrency)
        self.batch_size, self.concurrency = config.batch_size, config.concurrency
        self.is_held_to_schema = config.answer_format == "json_schema"
        # Where a model runs does not decide what it says, and a restarted server may have another address.
        self.identity = {
            "kind": "server",
            "model": config.model,
            "answer_format": config.answer_format,
            "max_tokens": str(config.max_tokens),
            "temperature": str(config.temperature),
            "seed": str(config.seed),
        }
        self._asked = {**self.identity, "base_url": str(self._client.base_url)}
        self._cache = cache

    def __call__(self, questions: Sequence[Question]) -> list[Reply | Fault]:
        """Ask all questions, at most `concurrency` at the same time over all threads that use this object.

        Returns:
            One reply per question, or what went wrong with it.
        """
        if len(questions) == 1:
            return [self._answer(questions[0])]
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(copy_context().run, self._answer, question) for question in questions]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _answer(self, question: Question) -> Reply | Fault:
        if known := self._cache.load(self._asked, question):
            return known
        with self._slots:
            reply = self._ask(question)
        if isinstance(reply, Reply):
            self._cache.save(self._asked, question, reply)
        return reply

    def _ask(self, question: Question) -> Reply | Fault:
        try:
            return self._send_for_one(self._client, question)
        except openai.APITimeoutError as error:
            return self._ask_again(question, error)
        except openai.APIStatusError as error:
            if error.status_code in _REFUSES_EVERYBODY:
                raise self._unavailable(error) from error
            if error.status_code >= _MAY_PASS:
                return self._ask_again(question, error)
            self._check_it_works(error)
            return _fault(error)

    def _ask_again(self, question: Question, first: openai.APIError) -> Reply | Fault:
        """Once more, after the server has shown that it works: it may have been restarting."""
        self._check_it_works(first)
        try:
            return self._send_for_one(self._client.with_options(max_retries=0), question)
        except (openai.APIStatusError, openai.APITimeoutError) as error:
            return _fault(error)

    def _send_for_one(self, client: openai.AsyncOpenAI, question: Question) -> Reply | Fault:
        """A question whose answer may be too long, too deep or no answer of the API at all."""
        try:
            return self._send(client, question)
        except (openai.APIStatusError, openai.APITimeoutError):
            raise
        except (openai.APIConnectionError, RefusedError) as error:
            raise self._unavailable(error) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            return _fault(error)

    def _check_it_works(self, first: openai.APIError) -> None:
        """Ask a small question of the same form."""
        try:
            self._send(self._client.with_options(max_retries=0), _SMALL)
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            raise self._unavailable(error if isinstance(error, openai.APIError) else first) from error

    def _send(self, client: openai.AsyncOpenAI, question: Question) -> Reply | Fault:
        config = self._config
        asked = client.chat.completions.create(
            model=config.model,
            messages=[{"role": "user", "content": _content(question)}],  # pyright: ignore[reportArgumentType]
            response_format=_response_format(question) if self.is_held_to_schema else openai.omit,  # pyright: ignore[reportArgumentType]
            max_tokens=openai.omit if config.max_tokens is None else config.max_tokens,
            temperature=openai.omit if config.temperature is None else config.temperature,
            seed=openai.omit if config.seed is None else config.seed,
            logprobs=True if self._tells_first_tokens else openai.omit,
            top_logprobs=_TOP_LOGPROBS if self._tells_first_tokens else openai.omit,
        )
        return _reply(asyncio.run_coroutine_threadsafe(asked, self._loop).result())

    def _unavailable(self, error: openai.OpenAIError) -> Unavailable:
        where, model, said = f"the server at {self._address}", self._config.model, _said(error)
        status = error.status_code if isinstance(error, openai.APIStatusError) else _REFUSES_EVERYBODY[0]
        advice = "" if status in _REFUSES_EVERYBODY else self._advice(said)
        if status < _MAY_PASS and advice:
            return Unavailable(f"{where} refuses all questions for model {model!r}: {said[:500]}; {advice}")
        more = f"; {advice}" if advice else ""
        seen = f"{where} does not answer for model {model!r}: {said[:500]}"
        return Unavailable(f"{seen}; see that it runs and knows the model, then run again{more}")

    def _advice(self, said: str) -> str:
        """What to change where a server refuses even a small question."""
        named = [name for name in _OPTIONAL if vars(self._config)[name] is not None and name in said]
        if named:
            names = " and ".join(named)
            return f"if it does not take {names}, set {names} to null, which is not sent"
        return 'if it does not know json_schema, set answer_format to "prompt"' if self.is_held_to_schema else ""


def _client(config: ChatConfig) -> openai.AsyncOpenAI:
    key = os.environ.get("OPENAI_API_KEY", "")
    address = config.base_url or os.environ.get("OPENAI_BASE_URL", "")
    if not (key or address):
        raise InputError(
            "no base_url is set, which means the hosted server, but the environment has no OPENAI_API_KEY; set the key "
            "there, or give the address of a server of your own"
        )
    check_address(address, key)
    transport = BoundedTransport(seconds=config.timeout_seconds, key=key)
    return openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=address or None,
        timeout=config.timeout_seconds,
        max_retries=config.max_retries,
        http_client=httpx2.AsyncClient(transport=transport, timeout=config.timeout_seconds),
    )


@cache
def _loop_of(process: int) -> asyncio.AbstractEventLoop:
    """Where all requests of a process wait; only what waits in a loop can be given up at any moment."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def _content(question: Question) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in question.images]
    return [*images, {"type": "text", "text": question.text}]


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _response_format(question: Question) -> dict[str, Any] | None:
    if question.answer is None:
        return None
    schema = {"name": question.answer.__name__, "schema": answer_schema(question.answer), "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _reply(completion: object) -> Reply | Fault:
    """What the model said, out of what should be a completion; the SDK checks nothing of what servers send."""
    if not isinstance(completion, ChatCompletion):
        return Fault("raised", "the server sent something that is no chat completion", raw=str(completion))
    choices = completion.choices
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.message if isinstance(choice, Choice) else None
    if not isinstance(choice, Choice) or not isinstance(message, ChatCompletionMessage):
        return Fault(
            "empty", "the server sent a completion without a message", raw=completion.model_dump_json(warnings=False)
        )
    refusal = message.refusal or ("content filter" if choice.finish_reason == "content_filter" else "")
    is_cut = choice.finish_reason == "length"
    return Reply(str(message.content or ""), str(refusal), is_cut=is_cut, first_tokens=_first_tokens(choice))


def _first_tokens(choice: Choice) -> Mapping[str, float] | None:
    """Of servers that tell them; of a token that is written in two ways, both."""
    told = getattr(choice.logprobs, "content", None)
    first = told[0] if isinstance(told, list) and told else None
    rows = [(getattr(one, "token", None), getattr(one, "logprob", None)) for one in getattr(first, "top_logprobs", ())]
    found: dict[str, float] = {}
    for token, logprob in rows:
        if not isinstance(token, str) or not isinstance(logprob, int | float) or not logprob <= 0:
            return None
        found[token] = found.get(token, 0.0) + math.exp(logprob)
    return found or None


def _fault(error: Exception) -> Fault:
    raw = error.beginning if isinstance(error, OversizedError) else _said(error)
    what = str(error) if isinstance(error, OversizedError) else type(error).__name__
    return Fault("raised", f"the server failed at this question: {what}", raw=raw)


def _said(error: Exception) -> str:
    """The error and its causes: the SDK's own "Connection error." says too little."""
    causes = [str(error)]
    while error.__cause__ and isinstance(error.__cause__, Exception):
        error = error.__cause__
        causes.append(str(error))
    return " ← ".join(causes)
