"""How the frozen base lies in memory: the same training and the same file, in fewer bytes."""

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.quantizers.bitsandbytes import bnb_quantizer

from rpo.adapters.lora import reference
from rpo.errors import InputError
from rpo.models import frozen
from rpo.models.checkpoint import Checkpoint
from rpo.models.frozen import check_frozen_base, is_quantized, moved, offload, stored_bytes
from rpo.models.plain import parts_of
from tests.contracts.families import FAMILIES
from tests.tiny import tiny_sd
from tests.trainers.pair_runs import trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")
CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_what_is_not_installed_is_told_before_a_weight_is_read(kind, library, monkeypatch):
    monkeypatch.setattr(frozen, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"{kind}, but {library} is not installed; pip install 'rpo\[lowbit\]'"):
        Checkpoint.load("nowhere", frozen_base=kind)


@pytest.mark.parametrize("kind", ["nf4", "offload"])
def test_what_needs_a_gpu_is_refused_on_the_cpu(kind, monkeypatch):
    monkeypatch.setattr(frozen, "find_spec", lambda name: name)
    with pytest.raises(InputError, match=f"frozen_base is {kind}, but the device is the CPU.*expected a GPU"):
        check_frozen_base(kind, CPU)
    check_frozen_base(kind, torch.device("cuda"))


def test_what_is_loaded_already_cannot_be_quantised(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "find_spec", lambda name: name)
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="single file or a pipeline; give a diffusers folder"):
        Checkpoint.load(tiny_sd(), frozen_base="int8")
    with pytest.raises(InputError, match="single file or a pipeline; give a diffusers folder"):
        Checkpoint.load(tmp_path / "one.safetensors", frozen_base="int8")


@pytest.fixture(params=["stable_diffusion", "sd3"])
def folder(request, tmp_path):
    FAMILIES[request.param]().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def on_the_cpu(monkeypatch):
    """4 bits without a GPU: diffusers refuses them there, though the library has slow kernels."""
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="4-bit weights need bitsandbytes")
    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr("rpo.models.checkpoint.check_frozen_base", lambda *_: None)


@pytest.mark.parametrize(("kind", "share", "off"), [("int8", 0.75, 0.1), ("nf4", 0.7, 0.3)])
def test_a_lora_on_few_bits_trains_and_serves_the_whole_checkpoint(folder, tmp_path, request, kind, share, off):
    pytest.importorskip("torchao", reason="8-bit weights need torchao")
    if kind == "nf4":
        request.getfixturevalue("on_the_cpu")
    whole, small = Checkpoint.load(folder), Checkpoint.load(folder, frozen_base=kind)
    assert stored_bytes(small.denoiser) < share * stored_bytes(whole.denoiser)
    quantised = {
        name for name, part in parts_of(small.pipe, small.family).items() if any(map(is_quantized, part.parameters()))
    }
    large = {name for name, part in small.text_encoders.items() if "CLIP" not in type(part).__name__}
    assert quantised == {small.family.denoiser, *large}
    before, x_t = small.fingerprint("denoiser"), torch.randn(2, *small.latent_shape())
    assert before != whole.fingerprint("denoiser")
    trainer = trainer_of(tmp_path / "run", pipe=small)
    trainer.train()
    assert small.fingerprint("denoiser") == before == Checkpoint.load(folder, frozen_base=kind).fingerprint("denoiser")
    assert {one.dtype for one in trainer.run.policy.parameters} == {torch.float32}
    cond, time = small.encode_prompts(["a", "b"]), torch.tensor([300, 700])
    with torch.no_grad():
        moved = small.predict(x_t, time, cond)
        with reference(small.denoiser):
            moved = moved - small.predict(x_t, time, cond)
        cond = whole.encode_prompts(["a", "b"])
        base = whole.predict(x_t, time, cond)
        whole.pipe.load_lora_weights(str(trainer.save()))
        served = whole.predict(x_t, time, cond) - base
    assert moved.norm() > 0
    assert (served - moved).norm() < off * moved.norm()


def test_8_bits_that_are_not_sound_or_not_alone_are_refused(folder):
    pytest.importorskip("torchao", reason="8-bit weights need torchao")
    small = Checkpoint.load(folder, frozen_base="int8")
    weights = next(one for one in small.denoiser.parameters() if is_quantized(one))
    with pytest.raises(InputError, match="adapter.train: full.*quantised or offloaded"):
        trainer_of(folder / "run", pipe=small, adapter={"train": "full"})
    kept = weights.scale.clone()
    weights.scale[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        small.check()
    weights.scale.copy_(kept)
    small.check()
    layer = next(one for one in small.denoiser.modules() if getattr(one, "weight", None) is weights)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(InputError, match="does not compute what its weights"):
        small.check()


@pytest.fixture
def present(monkeypatch):
    """Groups of layers that are on the device, by diffusers' own moves, and the most that were at once."""
    found, most = set(), [0]
    onload, leave = ModuleGroup.onload_, ModuleGroup.offload_

    def come(group):
        found.add(id(group))
        most[0] = max(most[0], len(found))
        onload(group)

    def go(group):
        found.discard(id(group))
        leave(group)

    monkeypatch.setattr(ModuleGroup, "onload_", come)
    monkeypatch.setattr(ModuleGroup, "offload_", go)
    return found, most


def offloaded():
    pipe = tiny_sd()
    offload(pipe.unet, CPU)
    return pipe


def test_offloaded_layers_come_one_by_one_and_training_is_the_same(tmp_path, present):
    found, most = present
    run = {"adapter": {"gradient_checkpointing": True}}
    plain = trainer_of(tmp_path / "plain", **run)
    plain.train()
    trainer = trainer_of(tmp_path / "offloaded", pipe=offloaded(), **run)
    trainer.train()
    assert not found, "layers stay on the device after backward"
    assert 0 < most[0] <= 4
    for one, other in zip(plain.run.policy.parameters, trainer.run.policy.parameters, strict=True):
        assert torch.equal(one, other)
    hooked = [name for name, one in trainer.run.model.denoiser.named_modules() if "_diffusers_hook" in vars(one)]
    assert hooked
    assert not any("lora_" in name for name in hooked), "an adapter would leave the device"
    trainer.save()


def test_offloading_needs_recomputation_and_frozen_weights(tmp_path):
    with pytest.raises(InputError, match="gradient_checkpointing: true"):
        trainer_of(tmp_path, pipe=offloaded())
    with pytest.raises(InputError, match="quantised or offloaded"):
        trainer_of(tmp_path, pipe=offloaded(), adapter={"train": "full", "gradient_checkpointing": True})


def test_hooks_of_others_beside_it_are_refused():
    pipe = offloaded()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(InputError, match="has diffusers' hooks"):
        Checkpoint(pipe)


class Elsewhere(torch.nn.Module):
    """A network that notes where it is sent."""

    def __init__(self, sent):
        super().__init__()
        self.weight, self.sent, self.computes_on = torch.nn.Parameter(torch.zeros(1)), sent, torch.device("meta")

    def to(self, device):
        self.sent.append(str(device))
        self.computes_on = torch.device(device)
        return self


def test_what_waits_comes_for_a_call_and_goes_again_even_after_an_error():
    sent = []
    waiting, near = Elsewhere(sent), torch.nn.Linear(1, 1)
    with moved([waiting, near], CPU):
        assert sent == ["cpu"]
        with moved([waiting], CPU):
            assert sent == ["cpu"]
    assert sent == ["cpu", "meta"]
    with pytest.raises(ZeroDivisionError), moved([waiting], CPU):
        1 / 0  # noqa: B018
    assert sent[2:] == ["cpu", "meta"]
