"""What a run will need, told before any weight is read, against what it does need."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rpo.adapters.lora import add_lora
from rpo.cli.main import main
from rpo.config.load import load_config
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.frozen import stored_bytes
from rpo.models.plain import parts_of
from rpo.models.sharding import blocks_of
from rpo.runs import plan as planning
from rpo.runs.plan import bytes_of
from rpo.runs.price import price
from rpo.runs.train_config import DPORunConfig, EndpointRunConfig, GRPORunConfig, RewardGradientRunConfig
from rpo.trainers.checks.footprint import PeakBytes
from rpo.types import Canvas, Conditioning
from tests.contracts.families import FAMILIES
from tests.marks import slow_but
from tests.tiny_amused import tiny_amused

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")
OLD = [name for name in ("stable_diffusion", "sdxl", "sd3") if name in FAMILIES]

UNWATCHED = "monitor.every=null"

KNOWN: planning.Known = {}
plan, to_fit = partial(planning.plan, known=KNOWN), partial(planning.to_fit, known=KNOWN)
"""Networks are counted once for all tests of a checkpoint."""


@pytest.fixture(scope="module", params=slow_but([name for name in OLD if name != "sdxl"], OLD))
def checkpoint(request, tmp_path_factory):
    """A folder of a family, and what is loaded from it; the folder has lost its weights since."""
    folder = tmp_path_factory.mktemp("checkpoint")
    FAMILIES[request.param]().save_pretrained(folder)
    loaded = {dtype: Checkpoint.load(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder, loaded


def settings(folder, *words, cls=DPORunConfig):
    return load_config(cls, None, [f"model.source={folder}", *words])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_bytes_are_those_of_the_loaded_checkpoint(checkpoint, dtype):
    folder, loaded = checkpoint
    model = loaded[getattr(torch, dtype)]
    found = plan(settings(folder, f"model.dtype={dtype}"))
    expected = {
        name: (sum(one.numel() for one in part.parameters()), sum(one.nbytes for one in part.parameters()))
        for name, part in parts_of(model.pipe, model.family).items()
    }
    assert found.parts == expected
    assert found.canvas == model.canvas


def test_operations_and_memory_are_those_of_the_real_computation(checkpoint):
    folder, loaded = checkpoint
    found = plan(settings(folder))
    model = Checkpoint(loaded[torch.float32].pipe)
    trained = add_lora(model.denoiser, target_modules=model.family.lora_targets)
    assert found.trained == sum(one.numel() for one in trained)
    cond, x_t, time = model.encode_prompts(["a"]), torch.randn(1, *model.latent_shape()), torch.full((1,), 500)

    def both():
        model.predict(x_t, time, cond).square().mean().backward()

    with torch.no_grad():
        with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):  # which torch counts on the CPU
            model.predict(x_t, time, cond)
        with PeakBytes() as held:
            model.predict(x_t, time, cond)
    assert found.forward.flops == counted.get_total_flops() > 0
    assert found.forward.peak == pytest.approx(held.peak, rel=0.05)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        both()
    with PeakBytes() as held:
        both()
    model.denoiser.delete_adapters(["default"])
    assert found.update.flops == pytest.approx(counted.get_total_flops(), rel=0.15)  # flash recomputes the scores
    assert found.update.flops >= counted.get_total_flops()
    assert found.update.peak == pytest.approx(held.peak, rel=0.05)


def test_a_guided_rollout_counts_both_branches_and_a_frozen_one_trains_half(checkpoint):
    folder, _ = checkpoint
    words = [
        "rollout.prompts=2",
        "rollout.images_per_prompt=3",
        "rollout.num_steps=5",
        UNWATCHED,
        "rollout.guidance_scale=4",
    ]
    found = plan(settings(folder, *words, cls=GRPORunConfig))
    assert found.cost == pytest.approx(6 * 5 * 2 + 6 * 5 * found.backward)
    assert found.drawn == 12
    longer = settings(folder, *words, "rollout.num_steps=7", cls=GRPORunConfig)
    priced = price(longer, found.backward, guided=found.guided)  # without counting the network again
    assert priced == pytest.approx(6 * 7 * 2 + 6 * 7 * found.backward)
    both = plan(settings(folder, *words, "steps.freeze_negative=false", cls=GRPORunConfig))
    assert both.cost == pytest.approx(6 * 5 * 2 + 6 * 5 * 2 * both.backward)
    alone = plan(settings(folder, *words[:-1], "rollout.guidance_scale=1", cls=GRPORunConfig))
    assert (alone.cost, alone.drawn) == (pytest.approx(6 * 5 + 6 * 5 * alone.backward), 6)


@pytest.mark.parametrize(
    ("objective", "others", "more"),
    [
        ("score_as_action", 1, []),
        ("nft", 2, []),
        ("rvm", 0, []),
        ("dgpo", 2, []),
        ("dgpo", 3, ["objective.clip=0.1"]),
        ("nft", 3, ["reference_guidance=4.5"]),
    ],
)
def test_what_an_endpoint_objective_asks_of_others_is_counted(checkpoint, objective, others, more):
    words = [
        "rollout.prompts=2",
        "rollout.images_per_prompt=3",
        "rollout.num_steps=5",
        UNWATCHED,
        "rollout.guidance_scale=1",
    ]
    words += ["steps.train_steps=2", f"objective.kind={objective}", *more]
    found = plan(settings(checkpoint[0], *words, cls=EndpointRunConfig))
    assert found.cost == pytest.approx(6 * 5 + 6 * 2 * (found.backward + others))


@pytest.mark.parametrize(
    ("words", "trained", "followed", "others"),
    [
        (["objective.last_steps=3"], 3, 2, 0),
        (["objective.last_steps=3", "kl_weight=0.1"], 3, 4, 1),
        (["objective.kind=alignprop"], 5, 4, 0),
        (["objective.kind=refl"], 1, 0, 0),
        (["objective.kind=srpo"], 2, 0, 1),
        (["objective.kind=adjoint_matching", "kl_weight=0.1", "steps.train_steps=2"], 2, 4, 1),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_what_a_slope_costs_is_counted(checkpoint, words, trained, followed, others):
    sizes = [
        "rollout.prompts=2",
        "rollout.images_per_prompt=3",
        "rollout.num_steps=5",
        UNWATCHED,
        "rollout.guidance_scale=1",
    ]
    found = plan(settings(checkpoint[0], *sizes, *words, cls=RewardGradientRunConfig))
    assert found.cost == pytest.approx(6 * 5 + 6 * trained * (found.backward + others) + 6 * followed * found.backward)
    assert found.peaks["the slope of 32 images"] > found.peaks["decoding 6 images"]


def test_looks_at_watched_prompts_are_counted(checkpoint):
    words = ["rollout.prompts=2", "rollout.images_per_prompt=3", "rollout.num_steps=5", "rollout.guidance_scale=4"]
    costs = [
        plan(settings(checkpoint[0], *words, *more, cls=GRPORunConfig)).cost
        for more in ([UNWATCHED], ["monitor.prompts=4", "monitor.every=2"])
    ]
    assert costs[1] - costs[0] == pytest.approx(4 * 2 / 2 * 5 * 2)


def test_an_order_by_the_reference_is_a_forward_more_in_each_step(tmp_path):
    tiny_amused().save_pretrained(tmp_path)
    words = ["rollout.prompts=2", "rollout.images_per_prompt=3", "rollout.num_steps=5", UNWATCHED]
    costs = [
        plan(settings(tmp_path, *words, f"rollout.order={order}", "rollout.guidance_scale=4", cls=GRPORunConfig)).cost
        for order in ("policy", "reference")
    ]
    assert costs[1] - costs[0] == pytest.approx(6 * 5 * 2)


def test_a_graph_that_is_kept_is_that_of_all_trained_steps(checkpoint):
    words = [
        "rollout.prompts=2",
        "rollout.images_per_prompt=3",
        "rollout.num_steps=5",
        UNWATCHED,
        "rollout.guidance_scale=1",
    ]
    kept = plan(settings(checkpoint[0], *words, "steps.keep_graph=true", cls=GRPORunConfig))
    assert kept.rows == 6 * 5
    assert kept.peaks["an update, 30 latents at once"] > 30 * kept.update.peak


def test_networks_are_counted_once_for_what_changes_nothing_in_them(tmp_path, monkeypatch):
    FAMILIES["sd3"]().save_pretrained(tmp_path)
    counted, count = [], planning._counted
    monkeypatch.setattr(planning, "_counted", lambda *given: counted.append(1) or count(*given))
    with pytest.raises(InputError, match="with all of"):
        planning.to_fit(settings(tmp_path), 1)
    assert len(counted) == 3  # as given, in half precision, and with what is computed again


def test_full_fine_tuning_in_half_precision_is_refused_before_anything_is_counted(checkpoint):
    with pytest.raises(InputError, match="float32"):
        plan(settings(checkpoint[0], "adapter.train=full", "model.dtype=bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux2_klein"])
def test_bytes_of_8_bits_are_those_of_the_loaded_checkpoint(family, dtype, tmp_path):
    pytest.importorskip("torchao", reason="8-bit weights need torchao")
    FAMILIES[family]().save_pretrained(tmp_path)
    model = Checkpoint.load(tmp_path, dtype=getattr(torch, dtype), frozen_base="int8")
    found = plan(settings(tmp_path, f"model.dtype={dtype}", "model.frozen_base=int8"))
    held = {name: stored_bytes(part) for name, part in parts_of(model.pipe, model.family).items()}
    assert {name: size for name, (_, size) in found.parts.items()} == held


def test_what_leaves_the_device_does_not_count_while_updates_run(checkpoint):
    folder, _ = checkpoint
    ahead, now = (plan(settings(folder, "preview_every=1", f"encode_ahead={one}")) for one in ("true", "false"))
    away = {name: size for name, (_, size) in ahead.parts.items() if name not in ("unet", "transformer")}
    for name, peak in now.peaks.items():
        gone = sum(away.values()) if name.startswith(("an update", "drawing")) else 0
        gone += sum(size for part, size in away.items() if part != "vae") if name.startswith("decoding") else 0
        assert ahead.peaks[name] == peak - gone
    words = ["adapter.gradient_checkpointing=true"]
    whole, offloaded = (plan(settings(folder, *words, f"model.frozen_base={one}")) for one in ("whole", "offload"))
    denoiser = next(size for name, (_, size) in whole.parts.items() if name not in away)
    assert offloaded.fetched is not None
    assert 0 < offloaded.fetched < denoiser
    assert offloaded.peaks["at rest"] == whole.peaks["at rest"] - denoiser + offloaded.fetched
    assert "so does the denoiser" in str(offloaded)


def test_what_to_change_is_said_in_the_order_of_what_it_costs(tmp_path):
    FAMILIES["stable_diffusion"]().save_pretrained(folder := tmp_path)
    config = settings(folder, "preview_every=0")
    whole = plan(config)
    changes, same = to_fit(config, whole.peak)
    assert (changes, same) == ([], whole)
    changes, smaller = to_fit(config, 0.5 * whole.peak)
    assert changes == ["model.dtype: bfloat16", "learning.micro_batch: 1"]
    assert smaller.peak <= 0.5 * whole.peak
    with pytest.raises(InputError, match=r"with all of .*model\.dtype.*frozen_base.*larger card"):
        to_fit(config, 1)


@pytest.mark.parametrize("family", ["qwen_image", "z_image", "lumina2"])
def test_networks_that_look_where_a_prompt_ends_are_planned_for_the_longest(family, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path)
    words = ["resolution=64", "adapter.gradient_checkpointing=true"]
    found, model = plan(settings(tmp_path, *words)), Checkpoint.load(tmp_path)
    embedding = dict(model.encode_prompts(["a"]).prompt)
    embedding["mask"] = torch.ones_like(embedding["mask"], dtype=torch.bool)
    x_t, time = torch.randn(1, *model.latent_shape(Canvas(64, 64))), torch.full((1,), 500)
    add_lora(model.denoiser, target_modules=model.family.lora_targets)
    with torch.no_grad(), FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model.predict(x_t, time, Conditioning(embedding, embedding))
    assert found.forward.flops == pytest.approx(counted.get_total_flops(), rel=0.05)
    assert found.backward > 2


def test_packed_latents_are_planned(tmp_path):
    FAMILIES["flux1"]().save_pretrained(tmp_path / "flux1")
    found = plan(load_config(GRPORunConfig, None, [f"model.source={tmp_path / 'flux1'}", "rollout.guidance_scale=4"]))
    assert found.drawn == GRPORunConfig().rollout.images  # told the scale, in one call
    assert found.backward > 1


def test_it_is_printed_and_what_cannot_be_planned_is_one_line(checkpoint, tmp_path, capsys):
    folder, _ = checkpoint
    assert main(["plan", "dpo", f"model.source={folder}", "--memory", "80GB"]) == 0
    assert "nothing to change" in capsys.readouterr().out
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["plan", "dpo", f"model.source={tmp_path / 'model.safetensors'}"]) != 0
    assert "single file" in capsys.readouterr().err
    with pytest.raises(InputError, match="'24' is needed|is '24'"):
        bytes_of("24")


def test_recomputing_saves_in_the_plan_what_it_saves(tmp_path):
    """Counters of operations can keep what is recomputed alive: the plan's does not."""
    FAMILIES["sd3"]().save_pretrained(tmp_path)
    found = plan(settings(tmp_path, "adapter.gradient_checkpointing=true"))
    model = Checkpoint.load(tmp_path)
    add_lora(model.denoiser, target_modules=model.family.lora_targets)
    model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    cond, x_t, time = model.encode_prompts(["a"]), torch.randn(1, *model.latent_shape()), torch.full((1,), 500)
    with PeakBytes() as held:
        model.predict(x_t, time, cond).square().mean().backward()
    assert found.update.peak == pytest.approx(held.peak, rel=0.05)
    assert found.update.peak < plan(settings(tmp_path)).update.peak


def test_what_is_divided_lies_in_parts_beside_two_whole_blocks(checkpoint):
    folder, loaded = checkpoint
    denoiser = loaded[torch.float32].denoiser
    alone, four = plan(settings(folder)), plan(settings(folder, "learning.sharding=full"), processes=4)
    largest = max(map(stored_bytes, blocks_of(denoiser)))
    assert alone.weights() - four.weights() == stored_bytes(denoiser) - (stored_bytes(denoiser) // 4 + 2 * largest)
    assert four.own == alone.own == alone.trained
    whole = ["adapter.train=full", "learning.sharding=full"]
    assert plan(settings(folder, *whole), processes=4).own == -(-alone.parts[next(iter(alone.parts))][0] // 4)
    with pytest.raises(InputError, match="there is one process; launch several"):
        plan(settings(folder, "learning.sharding=full"))
    with pytest.raises(InputError, match="processes is 0, but one at least"):
        plan(settings(folder, "learning.sharding=full"), processes=0)


def test_several_processes_divide_what_does_not_fit_and_one_does_not(checkpoint, monkeypatch):
    folder, _ = checkpoint
    monkeypatch.setattr("rpo.runs.plan.CHANGES", (("learning.sharding", "full"), ("model.frozen_base", "int8")))
    monkeypatch.setattr("rpo.runs.plan.WORTHWHILE", 1.0)
    divided = plan(settings(folder, "learning.sharding=full"), processes=64)
    changes, found = to_fit(settings(folder), divided.peak, processes=64)
    assert changes == ["learning.sharding: full"] and found == divided
    with pytest.raises(InputError, match="the run needs"):
        to_fit(settings(folder), divided.peak // 100, processes=64)  # few bits cannot be divided
    assert "learning.sharding: full" not in to_fit(settings(folder), plan(settings(folder)).peak - 1)[0]
