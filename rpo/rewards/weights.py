"""Weights that lie in one file: found in a folder or on the hub, read without running code of theirs, and fitted whole.

A file that has too little, too much or other shapes is one error that names it and says what it should hold: what it
lacks would be random, and the score with it.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from rpo.errors import InputError


def find_file(source: str, *names: str) -> Path:
    """The first of these files that is in a folder; of a hub id, owner/name, the first, which is fetched if need be."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(source).is_dir():
        found = [file for name in names if (file := Path(source) / name).is_file()]
        if found:
            return found[0]
        raise InputError(f"{source} has no {' or '.join(names)}; expected a folder that has; put it there")
    try:
        return Path(hf_hub_download(source, names[0]))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise InputError(
            f"no {names[0]} can be had of {source!r} ({error}); expected a folder that has it or a hub id; give "
            "another one, or download it where there is a network"
        ) from error


def read_state(file: Path, *, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of one of `torch.save`, bare or under "state_dict".

    Args:
        dtype: Their precision; None for that of the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file} cannot be read ({reason}); expected a file of weights; fetch it anew") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file} holds a {type(state).__name__} of other things; expected tensors by their names")
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def fitted(
    cls: Any,
    config: Any,
    state: Mapping[str, Tensor],
    file: Path,
    *,
    what: str,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Any:
    """A model of transformers with exactly these weights, ready to be asked.

    Args:
        file: Where the weights are from, and
        what: what they should be, for an error.
        dtype: The precision that it computes in.
        **more: What else the class is made with.
    """
    with torch.device("meta"):
        check_fit(state, cls(config, **more), file, what=what)
    model = cls.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype, **more)
    return model.eval().requires_grad_(False)


def check_fit(state: Mapping[str, Tensor], module: nn.Module, file: Path, *, what: str) -> None:
    """Refuse weights that are not those of a module, name by name and shape by shape."""
    own = module.state_dict()
    lacking, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if lacking:
        fault = f"lacks {len(lacking)} of the weights, such as {lacking[0]}"
    elif other:
        name = min(other)
        fault = f"has {name} of shape {list(state[name].shape)} and not {list(own[name].shape)}"
    elif foreign:
        fault = f"has {len(foreign)} weights too many, such as {foreign[0]}"
    else:
        return
    raise InputError(f"{file} {fault}; expected {what}; give the file that was published as this, or one like it")


class LinearHead(nn.Module):
    """Five linear layers to one number, with no activation between them; the published ones have dropout instead.

    Their numbers count the dropout layers: 0, 2, 4, 6, 7.
    """

    WIDTHS = (1024, 128, 64, 16, 1)
    DROPOUT_AFTER = 3

    def __init__(self, width: int) -> None:
        """Layers of random weights for embeddings of `width`."""
        super().__init__()
        layers = list[nn.Module]()
        for number, (inner, outer) in enumerate(zip((width, *self.WIDTHS), self.WIDTHS, strict=False)):
            layers.append(nn.Linear(inner, outer))
            if number < self.DROPOUT_AFTER:
                layers.append(nn.Identity())
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Tensor) -> Tensor:
        """One number per embedding, [batch]."""
        return self.layers(embeddings).squeeze(-1)


def read_head(state: Mapping[str, Tensor], width: int, file: Path) -> LinearHead:
    """The head with these weights, for embeddings of `width`."""
    head = LinearHead(width)
    check_fit(state, head, file, what=f"a head of five linear layers, layers.0 to layers.7, for embeddings of {width}")
    head.load_state_dict(dict(state))
    return head.eval().requires_grad_(False)
