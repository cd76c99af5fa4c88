"""From the command line, on a folder of every family: train, save, and draw the same where rpo is not installed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rpo.adapters.lora import load_lora
from rpo.cli.main import main
from rpo.models.checkpoint import Checkpoint
from rpo.models.families import family_named
from rpo.process.transition import Ddim
from rpo.sampling.sample import image_generator, sample
from rpo.types import Canvas
from tests.contracts.families import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:the network denoises no better"),
]

PROMPTS, CANVAS, GUIDANCE = ["a red circle", "a house"], Canvas(64, 64), 3.0
STEPS = 4  # 3 do not divide 1,000: there DDIM of diffusers steps to a neighbour of the timestep that comes next

SHARED = ["learning.updates=3", "learning.learning_rate=0.02", "learning.warmup_updates=0", "preview_every=0"]
SHARED += ["learning.progress=false", "report=false"]
ONLINE = ["rewards={jpeg-compressibility: 1.0}", "rollout.prompts=2", "rollout.images_per_prompt=2"]
ONLINE += ["rollout.num_steps=3"]
WORDS = {
    "dpo": ["pairs_per_update=2", "learning.micro_batch=2", "resolution=64"],
    "grpo": [*ONLINE, "rollout.guidance_scale=3"],
    "endpoint": [*ONLINE, "rollout.guidance_scale=3"],
}

PRESETS = ("nft", "awm", "ram", "rvm", "par", "dgpo", "rebel")
SLOPES = (
    ["objective.kind=draft", "objective.last_steps=2"],
    ["objective.kind=alignprop"],
    ["objective.kind=refl"],
    ["objective.kind=srpo"],
    ["objective.kind=adjoint_matching", "kl_weight=0.01"],
)
"""By turns: each family by one of them, which `tests/contracts` does for all as a plug-in."""

STOCK = """
import inspect, json, sys, torch, diffusers
told = json.loads(sys.argv[1])
assert "rpo" not in sys.modules
pipe = getattr(diffusers, told["kind"]).from_pretrained(told["folder"], **told["options"])
exec(told["preparation"])
pipe.load_lora_weights(told["lora"])
config = pipe.scheduler.config
if config.get("use_flow_sigmas"):
    pipe.scheduler = type(pipe.scheduler).from_config(config, solver_order=1)
elif "beta_schedule" in config:
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
    told["call"]["use_resolution_binning"] = False
generators = [torch.Generator("cpu").manual_seed(seed) for seed in told["seeds"]]
torch.save(pipe(generator=generators, output_type="pt", **told["call"]).images, told["to"])
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(0)
    lines = []
    for index in range(4):
        row = {"prompt": PROMPTS[index % 2]}
        for side in ("chosen", "rejected"):
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{side}{index}.png")
            row[side] = f"{side}{index}.png"
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("algorithm", WORDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_is_drawn_without_rpo(family, algorithm, pairs, tmp_path):
    trained_and_drawn(family, algorithm, WORDS[algorithm], pairs, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_is_what_a_published_endpoint_objective_trained(family, pairs, tmp_path):
    kind = PRESETS[list(FAMILIES).index(family) % len(PRESETS)]
    words = [*WORDS["endpoint"], f"objective.kind={kind}", "rollout.num_steps=4"]
    trained_and_drawn(family, "endpoint", words, pairs, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_is_what_a_slope_trained(family, pairs, tmp_path):
    kind = SLOPES[list(FAMILIES).index(family) % len(SLOPES)]
    reward = "rewards={tests.trainers.online_runs:lightness: 1.0}"
    trained_and_drawn(family, "reward-gradient", [*WORDS["grpo"], *kind, reward], pairs, tmp_path)


def trained_and_drawn(family, algorithm, more, pairs, tmp_path):
    pipe, folder, output = FAMILIES[family](), tmp_path / "checkpoint", tmp_path / "run"
    pipe.save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    data = f"data.source={pairs}" if algorithm == "dpo" else f"prompts={tmp_path / 'prompts.txt'}"
    words = [f"model.source={folder}", data, f"output={output}", *SHARED, *more]
    assert main(["train", algorithm, *words]) == 0

    model, base = Checkpoint.load(folder), Checkpoint.load(folder)
    load_lora(model, output / "lora")
    seeds = [image_generator(7, index, 0) for index in range(2)]
    ours, before = (
        one.decode(
            sample(
                one,
                one.encode_prompts(PROMPTS),
                one.grid(STEPS, CANVAS),
                Ddim(0.0),
                guidance_scale=GUIDANCE,
                generators=[torch.Generator().manual_seed(seed.initial_seed()) for seed in seeds],
                canvas=CANVAS,
            ).x_0
        )
        for one in (model, base)
    )
    kind = family_named(type(pipe).__name__)
    call = {"prompt": PROMPTS, "height": 64, "width": 64, "num_inference_steps": STEPS}
    call[kind.guidance_argument] = GUIDANCE - kind.guidance_offset
    if kind.guidance_argument == "true_cfg_scale":
        call["negative_prompt"] = [""] * 2
    told = {
        "kind": type(pipe).__name__,
        "folder": str(folder),
        "lora": str(output / "lora"),
        "preparation": "\n".join(kind.lora_preparation),
        "options": dict(kind.load_options),
        "seeds": [seed.initial_seed() for seed in seeds],
        "call": call,
        "to": str(tmp_path / "stock.pt"),
    }
    subprocess.run([sys.executable, "-c", STOCK, json.dumps(told)], check=True, cwd=tmp_path)
    theirs = torch.load(tmp_path / "stock.pt")
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - before).abs().max() > 1e-3
