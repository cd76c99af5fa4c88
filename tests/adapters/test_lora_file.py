import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rpo.adapters.lora import add_lora, lora_parameters, save_lora
from rpo.adapters.lora_file import WEIGHT_FILE, inspect_lora, put_in_order
from rpo.adapters.stack import stack_loras
from rpo.models.checkpoint import Checkpoint
from rpo.trainers.policy import FullPolicy
from tests.tiny import tiny_sd

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LoRA of rank 3 saved by rpo itself, and the model that carries it."""
    model = Checkpoint(tiny_sd())
    add_lora(model.denoiser, rank=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model.denoiser):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("lora")
    save_lora(model, folder)
    return folder, model


def write(folder, tensors, alpha=None):
    metadata = {} if alpha is None else {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha, "unet.r": 2})}
    save_file(tensors, folder / WEIGHT_FILE, metadata)
    return folder


def factors(rank=2, up=1.0, down_name="unet.a.lora.down.weight", up_name="unet.a.lora.up.weight"):
    return {down_name: torch.ones(rank, 8), up_name: torch.full((8, rank), up)}


def test_a_saved_lora_tells_what_it_is(saved):
    folder, model = saved
    found = inspect_lora(folder)
    parameters = lora_parameters(model.denoiser)
    assert found.path == folder / WEIGHT_FILE
    assert found.ranks == (3,) and found.alpha == 3 and found.is_portable
    assert found.num_parameters == sum(p.numel() for p in parameters)
    assert found.num_layers == len(parameters) // 2
    assert found.parts == ("unet",)
    assert found.size_bytes == found.path.stat().st_size
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    assert inspect_lora(found.path) == found


@pytest.mark.parametrize(
    ("down", "up"), [("lora.down", "lora.up"), ("lora_A", "lora_B"), ("lora_down", "lora_up")], ids=str
)
def test_every_dialect_is_read(tmp_path, down, up):
    write(tmp_path, factors(down_name=f"unet.a.{down}.weight", up_name=f"unet.a.{up}.weight"))
    found = inspect_lora(tmp_path)
    assert found.ranks == (2,) and found.num_parameters == 32 and found.alpha is None and found.is_portable


def test_another_alpha_than_the_rank_is_not_portable(tmp_path):
    assert not inspect_lora(write(tmp_path, factors(), alpha=4)).is_portable
    assert inspect_lora(write(tmp_path, factors(), alpha=2)).is_portable


def test_no_file(tmp_path):
    message = f"there is no LoRA at {tmp_path}; expected"
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect_lora(tmp_path)


def test_a_truncated_file(saved, tmp_path):
    data = (saved[0] / WEIGHT_FILE).read_bytes()
    (tmp_path / WEIGHT_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"is not a complete safetensors file .*; save or download it again"):
        inspect_lora(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"conv.weight": torch.ones(2)}, "has 0 down and 0 up factors among 1 tensors, but a LoRA has as many of both"),
        (factors() | {"unet.b.lora.down.weight": torch.ones(2, 8)}, "has 2 down and 1 up factors among 3 tensors"),
        (factors(up=0.0), "changes nothing: every up factor is zero, as before the first update; train before saving"),
        (factors(up=float("nan")), "holds numbers that are not finite, in unet.a.lora.up.weight; go back"),
    ],
)
def test_what_is_no_working_lora_is_refused(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect_lora(write(tmp_path, tensors))


@pytest.mark.slow
def test_the_same_adapter_is_the_same_file_in_every_process(saved, tmp_path):
    folder, model = saved
    first = save_lora(model, tmp_path / "again").read_bytes()
    assert first == (folder / WEIGHT_FILE).read_bytes()
    script = (
        "import sys, torch\n"
        "from rpo.adapters.lora import add_lora, lora_parameters, save_lora\n"
        "from rpo.models.checkpoint import Checkpoint\n"
        "from tests.tiny import tiny_sd\n"
        "model = Checkpoint(tiny_sd())\n"
        "add_lora(model.denoiser, rank=3)\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "for one in lora_parameters(model.denoiser): one.data = torch.randn(one.shape, generator=generator) * 0.1\n"
        "save_lora(model, sys.argv[1])\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}  # the order of sets
    words = [sys.executable, "-c", script, tmp_path / "other"]
    subprocess.run(words, check=True, cwd=ROOT, env=environment, capture_output=True)
    assert (tmp_path / "other" / WEIGHT_FILE).read_bytes() == first


def test_metadata_is_put_in_one_order_and_nothing_else_is_changed(tmp_path):
    tensors = factors() | {"unet.a.bias": torch.arange(3, dtype=torch.bfloat16)}
    metadata = {name: f"{name} «ä»" for name in "qwertyuiop"}
    contents, keys = set(), set()
    for _ in range(8):
        save_file(tensors, tmp_path / WEIGHT_FILE, metadata)
        keys.add(inspect_lora(tmp_path).key)
        put_in_order(tmp_path / WEIGHT_FILE)
        contents.add((tmp_path / WEIGHT_FILE).read_bytes())
    assert len(contents) == len(keys) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / WEIGHT_FILE]
    read = load_file(tmp_path / WEIGHT_FILE)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)
    with safe_open(tmp_path / WEIGHT_FILE, framework="pt") as opened:
        assert opened.metadata() == metadata


def test_another_tensor_name_or_alpha_is_another_key(tmp_path):
    others = [
        factors(),
        factors(up=2.0),
        factors(up_name="unet.b.lora.up.weight"),
        {name: tensor.half() for name, tensor in factors().items()},
    ]
    keys = {inspect_lora(write(tmp_path, tensors)).key for tensors in others}
    keys |= {inspect_lora(write(tmp_path, factors(), alpha=alpha)).key for alpha in (1, 2)}
    assert len(keys) == 6


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_others_may_read_it_as_any_other_file(saved, tmp_path, mask):
    before = os.umask(mask)
    try:
        lora = save_lora(saved[1], tmp_path / "lora")
        stacked = stack_loras([lora.parent], tmp_path / "stacked")
        FullPolicy(Checkpoint(tiny_sd())).save(tmp_path / "pipeline")
        (tmp_path / "any").write_text("")
    finally:
        os.umask(before)
    files = [lora, stacked, *(tmp_path / "pipeline").rglob("*.safetensors")]
    assert len(files) == 5
    assert {file.stat().st_mode for file in files} == {(tmp_path / "any").stat().st_mode}
