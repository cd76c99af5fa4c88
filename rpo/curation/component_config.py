"""How a configuration asks for a critic, an instructor, a judge or an editor: a kind and what that kind needs.

A kind is a name of the package's own ("shapes", "server", "local" …) or "package.module:attribute" of one's own.
"""

from typing import Literal
from urllib.parse import urlsplit

from rpo.errors import InputError
from rpo.ranges import Count, NotNegative, Positive, Seed, Text, WholeNumber
from rpo.settings import settings

DType = Literal["auto", "float32", "float16", "bfloat16"]


@settings
class ChatConfig:
    """Which critic, instructor or judge, and how it is asked."""

    kind: Text = "shapes"
    """"shapes" is that of the embedded world, "server" an OpenAI-compatible server, "local" a model on this machine;
    "package.module:attribute" is one of your own."""

    model: str = ""
    """Name of the model, as the server or the Hub calls it."""

    base_url: str = ""
    """Address of the server, as in http://localhost:8000/v1; a key belongs into OPENAI_API_KEY."""

    prompt: str = ""
    """Path of a prompt template of your own; nothing is the package's."""

    concurrency: Count = 8
    """Requests under way at the same time, for a server; 4 to 64."""

    batch_size: Count = 1
    """Images of one request or one forward; more than 1 helps a local model only."""

    timeout_seconds: Positive = 120.0
    """How long one request may take, from connecting to the last byte; a retry is another request."""

    max_retries: WholeNumber = 5
    """Further tries of a failed request, each after a longer pause."""

    max_tokens: Count | None = 1024
    """Longest answer; a critique takes 100 to 500, three instructions 30 to 100, a verdict 20 to 60. Null is
    not sent, for a server that does not take it."""

    temperature: NotNegative | None = 0.0
    """0 is the likeliest answer; more varies it. Null is not sent, for a server that does not take it."""

    seed: Seed | None = 0
    """Of the sampling, where the temperature is not 0. Null is not sent, for a server that does not take it."""

    device: Text = "auto"
    """Of a local model; "auto" takes the GPU when there is one."""

    dtype: DType = "auto"
    """Of a local model; "auto" is what its checkpoint says."""

    answer_format: Literal["json_schema", "prompt"] = "json_schema"
    """How a server is held to the form of the answer: "json_schema" lets it enforce the schema; "prompt" only asks for
    it, for a server that cannot. The answer is checked in both cases."""

    cache: bool = True
    """Whether answers are kept in the run's folder, so that a question is asked once."""

    def __post_init__(self) -> None:
        """Refuse an address that cannot be written down."""
        check_address(self.base_url)


@settings
class CriticConfig(ChatConfig):
    """Which critic, and how it is asked; that of shapes reads images with the verifier's eyes."""


@settings
class InstructorConfig(ChatConfig):
    """Which instructor, and how it is asked."""


@settings
class JudgeConfig(ChatConfig):
    """Which pairwise judge, and how it is asked; that of shapes is the verifier."""

    kind: Text = "shapes"
    """As that of critics; or "reward", which compares the scores of the reward that `model` names."""

    model: str = ""
    """Name of the model, as the server or the Hub calls it; for kind "reward", that of the reward."""

    max_tokens: Count | None = 256
    """Longest answer; a verdict takes 20 to 60. Null is not sent, for a server that does not take it."""


@settings
class EditorConfig:
    """Which editor, and how it edits."""

    kind: Text = "shapes"
    """"shapes" is the small editor of the embedded world; "package.module:attribute" is one of your own. The others are
    listed in rpo/curation/editors."""

    model: str = ""
    """Hub id or folder of the weights; nothing is what the kind is known for."""

    base_model: str = ""
    """Hub id or folder of the base, for an editor that is an addition to one (ControlNet)."""

    num_steps: Count | None = None
    """Denoising steps; nothing is what the kind recommends."""

    guidance_scale: NotNegative | None = None
    """Strength of the instruction; nothing is what the kind recommends."""

    image_guidance_scale: NotNegative | None = None
    """How closely the source is kept; nothing is what the kind recommends."""

    conditioning_scale: NotNegative = 1.0
    """Strength of a ControlNet; 0 to 1."""

    batch_size: Count = 4
    """Images edited at once."""

    seed: Seed = 0
    """Of the edits; each image has a generator of its own made of it and of the record."""

    device: Text = "auto"
    """"auto" takes the GPU when there is one."""

    dtype: DType = "auto"
    """"auto" is half precision on a GPU, float32 elsewhere."""


def check_address(base_url: str, key: str = "") -> None:
    """Refuse an address of a server that is none, or that holds what must not be written down; it is never shown.

    Args:
        base_url: What should be the address; empty for the hosted server.
    """
    if not base_url:
        return
    try:
        parts = urlsplit(base_url)
        found = {
            "a user or password": "@" in parts.netloc,
            "a query": "?" in base_url,
            "a fragment": "#" in base_url,
            "the key": bool(key) and key in base_url,
            "no http:// or https:// at its start": parts.scheme not in ("http", "https"),
            "no host": not parts.hostname,
        }
    except ValueError:
        found = {"no host that can be read": True}
    wrong = [what for what, is_so in found.items() if is_so]
    if wrong:
        raise InputError(
            f"base_url (not shown here) has {' and '.join(wrong)}; expected a plain address as in "
            "http://localhost:8000/v1, for it is kept with the run; put a key or password into the environment "
            "variable OPENAI_API_KEY, which is written nowhere"
        )
