"""Prompts are files: jinja2 templates that a user can replace, known by the sha256 of their bytes.

The package's own are in rpo/curation/prompts. A template is told the caption, what the critic said, and, where nothing
else enforces it, the JSON schema of the answer; it need not use all of them, but it may use nothing else. It runs in
jinja2's sandbox, for a template is a text that people pass on, and no program. `{{ caption | quoted }}` is the caption
as a JSON string, whose end no caption can fake.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel

from rpo.curation.vlm.answers import answer_schema
from rpo.errors import InputError
from rpo.files.text import decode_text

FOLDER = Path(__file__).parents[1] / "prompts"


class PromptFile:
    """A template and the hash of its file.

    Example:
        >>> PromptFile.load("critique", "", variables=("caption",)).render({"caption": "a red fox"})[:23]
        'You check one picture t'
    """

    def __init__(self, source: bytes, *, name: str, variables: Collection[str]) -> None:
        """Take a template."""
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        environment.globals.clear()  # a prompt counts nothing and imports nothing
        environment.filters["quoted"] = quoted
        try:
            text = decode_text(source, name)
            used = meta.find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except (ValueError, jinja2.TemplateError) as error:
            raise InputError(f"prompt {name} is no jinja2 template in UTF-8 ({error}); mend it") from error
        known = {*variables, "schema"}
        if not text.strip() or used - known:
            given = f"uses {', '.join(sorted(used - known))}" if text.strip() else "is empty"
            raise InputError(
                f"prompt {name} {given}; expected a text that uses some of {', '.join(sorted(known))}; change the file"
            )
        self.sha256 = hashlib.sha256(source).hexdigest()
        try:
            self._template.render(dict.fromkeys(known, "a red fox"))
        except Exception as error:  # the sandbox and the expressions of a template may raise anything
            raise InputError(
                f"prompt {name} cannot be filled in ({type(error).__name__}: {error}); expected a text that shows what "
                "it is told, and runs nothing else; change the file"
            ) from error

    @classmethod
    def load(cls, name: str, path: str, *, variables: Collection[str]) -> "PromptFile":
        """Read the package's prompt of that name, or the file at `path` instead.

        Args:
            path: Of a template of one's own; empty for the package's.
        """
        file = Path(path) if path else FOLDER / f"{name}.txt"
        try:
            source = file.read_bytes()
        except OSError as error:
            raise InputError(
                f"prompt '{file}' cannot be read ({error}); expected a jinja2 template; start from a copy of {FOLDER}"
            ) from error
        return cls(source, name=f"'{file}'", variables=variables)

    def render(self, values: Mapping[str, str], *, answer: type[BaseModel] | None = None) -> str:
        """The prompt for one question.

        Args:
            answer: The type whose schema the prompt must show; None where the server enforces it.
        """
        schema = json.dumps(answer_schema(answer)) if answer else ""
        return self._template.render({**values, "schema": schema})


def quoted(text: str) -> str:
    r"""A text as a JSON string on one line, so that nothing in it can end its quotation.

    Example:
        >>> quoted('a "red" fox')
        '"a \\"red\\" fox"'
    """
    plain = json.dumps(text, ensure_ascii=False)
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in plain)
