"""A denoiser divided among processes trains what one process with all of it does."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.devices import gathered
from rpo.models.sharding import refuse_settings
from rpo.objectives.endpoint.nft import Nft
from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.reward_gradient.adjoint_matching import AdjointMatching
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.trainer import Trainer
from rpo.training.checkpoint import checkpoint_path, read_part
from rpo.training.processes import Processes
from tests.forked import together
from tests.tiny import tiny_sd, tiny_sd3
from tests.tiny_amused import tiny_amused
from tests.trainers.online_runs import (
    ROLLOUT,
    VALUE,
    endpoint,
    grpo,
    learning,
    lightness,
    reward_gradient,
    score_as_action,
    small_value,  # noqa: F401
)
from tests.trainers.pair_runs import steady, trainer_of

UPDATES = 2


FOUR = replace(ROLLOUT, prompts=4, images_per_prompt=2)

of_two_blocks = partial(tiny_sd3, with_t5=False)
"""Whose forward waits for the other processes three times; that of the tiny UNet twenty times."""


def corner(images, prompts):
    """A pixel, which images differ in far more than by rounding."""
    return images[:, 0, 0, 0]


def share(sharding, **speed):
    """This process's part of four at once, divided where there are several."""
    count = Processes().count
    return {
        "updates": UPDATES,
        "learning_rate": 1e-3,
        "micro_batch": 4 // count,
        "sharding": sharding if count > 1 else "none",
    } | speed


def pairs(folder, sharding, *, pipe=None, speed=None, **changes):
    return trainer_of(folder, pipe=pipe or of_two_blocks(), learning=share(sharding, **(speed or {})), **changes)


def online(folder, sharding, *, make, pipe=None, reward=corner, speed=None, **changes):
    speed = learning(**share(sharding, **(speed or {})))
    return make(folder, pipe=pipe or of_two_blocks(), reward=reward, learning=speed, **{"rollout": FOUR} | changes)


PATHWISE = {"estimator": "pathwise", "value": replace(VALUE, uses_reward=False, sees_latents=True)}
RECOMPUTED = {"gradient_checkpointing": True}
# The first prompts of a pair set have all draws of the reference's errors on disk before others have theirs.
KEPT = {"draws_per_pair": 2, "objective": Dpo(context="reference"), "preflight": True, "preview_every": 2}
RUNS = {
    "dpo": (pairs, {"adapter": RECOMPUTED, **KEPT}),
    "dpo of a unet": (pairs, {"adapter": RECOMPUTED}),
    "dpo from a lora": (pairs, {}),
    "dpo of all weights": (pairs, {"adapter": {"train": "full"}, "speed": {"ema_decay": 0.5}}),
    "grpo": (online, {"make": grpo, "kl_weight": 0.01, "preflight": True}),
    "grpo live": (online, {"make": grpo, "steps": StepsConfig(keep_graph=True)}),
    "score-as-action": (online, {"make": score_as_action, "speed": {"learning_rate": 1e-2}, **PATHWISE}),
    "endpoint": (online, {"make": endpoint, "baseline": "value", "kl_weight": 0.01}),
    "nft": (online, {"make": endpoint, "objective": Nft()}),
    "reward-gradient": (
        online,
        {"make": reward_gradient, "reward": lightness, "objective": AdjointMatching(), "kl_weight": 1e-3},
    ),
}


def with_lora():
    """A UNet that carries a LoRA, from which training starts."""
    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), "mine")
    for index, (name, one) in enumerate(pipe.unet.named_parameters()):
        if ".lora_" in name:
            torch.nn.init.normal_(one, std=0.1, generator=torch.Generator().manual_seed(index))
    return pipe


OTHER_PIPES = {
    "dpo of a unet": tiny_sd,
    "dpo from a lora": with_lora,
    "score-as-action": tiny_sd,
    "reward-gradient": tiny_sd,
}


def made(folder, name, sharding) -> Trainer:
    make, changes = RUNS[name]
    return steady(make(folder, sharding, pipe=OTHER_PIPES.get(name, of_two_blocks)(), **changes))


def weights(trainer):
    return torch.cat([gathered(one.detach()).flatten() for one in trainer.run.policy.parameters])


def trained(folder, name, sharding="full"):
    trainer = made(folder, name, sharding)
    start = weights(trainer)
    trainer.train()
    return start, weights(trainer)


def with_files(folder, *, saves):
    trainer = pairs(folder, "full")
    start = weights(trainer)
    steady(trainer).train()
    divided = [type(one).__name__ for one in trainer.run.model.denoiser.parameters()].count("DTensor")
    if saves:
        trainer.save()
    return start, weights(trainer), divided


@pytest.mark.parametrize("saves", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_divided_base_trains_the_adapter_that_one_process_trains(tmp_path, saves):
    start, alone, divided = with_files(tmp_path / "one", saves=saves)
    both = together(2, tmp_path / "answers", partial(with_files, saves=saves), tmp_path / "two")
    assert divided == 0 and both[0][2] > 50
    assert torch.equal(both[0][1], both[1][1])
    assert (alone - start).abs().max() > 1e-3
    torch.testing.assert_close(both[0][1], alone, rtol=0, atol=1e-5)
    if not saves:
        return
    files = [load_file(tmp_path / name / "lora" / WEIGHT_FILE) for name in ("two", "one")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert tensor.dtype == files[1][name].dtype
        torch.testing.assert_close(tensor, files[1][name], rtol=0, atol=1e-5)
    one, two = (read_part(checkpoint_path(tmp_path / name, UPDATES), "weights.pt") for name in ("one", "two"))
    assert [part.shape for part in one["params"]] == [part.shape for part in two["params"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_algorithm_learns_the_same_on_a_divided_base(tmp_path, name):
    start, alone = trained(tmp_path / "one", name)
    both = together(2, tmp_path / "answers", trained, tmp_path / "two", name)
    assert torch.equal(both[0][1], both[1][1])
    assert (alone - start).abs().max() > 1e-4
    torch.testing.assert_close(both[0][1], alone, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "dpo of all weights"])
def test_copies_on_each_machine_of_what_is_divided_within_it(tmp_path, name):
    _, alone = trained(tmp_path / "one", name)
    four = together(4, tmp_path / "answers", trained, tmp_path / "four", name, "hybrid", machines=2)
    torch.testing.assert_close(four[3][1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "facts", "said"),
    [
        ("full", {"processes": 1}, "there is one process; launch several .torchrun"),
        ("full", {"processes": 2, "frozen_base": "int8"}, "frozen_base is int8, and only whole weights can be divided"),
        ("full", {"processes": 2, "frozen_base": "offload"}, "frozen_base is offload"),
        ("full", {"processes": 2, "is_compiled": True}, "give model.compile: false"),
        ("hybrid", {"processes": 2}, "1 of 2 processes are on this machine; give full"),
    ],
)
def test_what_cannot_be_divided_is_refused(kind, facts, said):
    with pytest.raises(ValueError, match=said):
        refuse_settings(kind, **facts)
    refuse_settings("none", **facts)


def test_a_trainer_alone_refuses(tmp_path):
    with pytest.raises(ValueError, match="learning.sharding is full, but there is one process"):
        trainer_of(tmp_path, learning={"sharding": "full"})


def of_tokens(folder):
    with pytest.raises(ValueError, match="does not say which blocks it is made of"):
        online(folder, "full", make=grpo, pipe=tiny_amused())


@pytest.mark.slow
def test_a_generator_of_tokens_is_refused(tmp_path):
    together(2, tmp_path / "answers", of_tokens, tmp_path / "run")
