"""A resume with something else is refused before anything in the folder is touched, and says what changed."""

import shutil
from dataclasses import replace

import pytest
import torch

from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.training.log import read_metrics
from tests.marks import slow_but
from tests.run_state import assert_refused
from tests.tiny import tiny_sd
from tests.trainers.online_runs import PROMPTS, TRAINERS, learning, small_value  # noqa: F401
from tests.trainers.pair_runs import toy_pairs, trained


def scaled(network):
    """A pipeline of which one network is another."""
    pipe = tiny_sd()
    with torch.no_grad():
        for parameter in pipe.components[network].parameters():
            parameter.mul_(0.9)
    return pipe


def other_vae_scale():
    pipe = tiny_sd()
    pipe.vae.register_to_config(scaling_factor=0.5)
    return pipe


def changed(index, **changes):
    """The toy pairs with one of them changed."""
    pairs = list(toy_pairs())
    pairs[index] = replace(pairs[index], **changes)
    return pair_set(pairs, origin="toy")


def bases():
    """Pipelines that differ in one thing, and what is said of it."""
    return {
        "unet": (lambda: scaled("unet"), r"base\.unet from \w{16} to \w{16}\)"),
        "text encoder": (lambda: scaled("text_encoder"), r"base\.text_encoder from"),
        "vae": (lambda: scaled("vae"), r"base\.vae from"),
        "vae scale": (other_vae_scale, r"vae\.scaling_factor from 0\.18215 to 0\.5"),
        "prediction": (lambda: tiny_sd("v_prediction"), "prediction_type from epsilon to v_prediction"),
        "betas": (lambda: tiny_sd(beta_end=0.02), r"scheduler\.beta_end from 0\.012 to 0\.02\)"),
        "beta schedule": (
            lambda: tiny_sd(beta_schedule="linear"),
            r"scheduler\.beta_schedule from scaled_linear to linear",
        ),
        "zero snr": (
            lambda: tiny_sd(rescale_betas_zero_snr=True),
            r"scheduler\.rescale_betas_zero_snr from False to True",
        ),
        "dtype": (lambda: tiny_sd(dtype=torch.bfloat16), r"dtype from torch\.float32, .* to torch\.bfloat16"),
    }


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    trained(folder, updates=1)
    return folder


@pytest.mark.parametrize("what", slow_but(("prediction", "betas", "dtype"), list(bases())))
def test_dpo_on_another_base(begun, what):
    make, message = bases()[what]
    assert_refused(begun, message, lambda: trained(begun, updates=2, resume=True, pipe=make()))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (changed(3, prompt="another"), r"\(prompts of the pairs from \w+ to \w+\)"),
        pytest.param(
            changed(3, rejected=toy_pairs()[4].rejected),
            r"\(rejected images from \w+ to \w+\)",
            marks=pytest.mark.slow,
        ),
        (changed(3, chosen=encode_png(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())), r"\(chosen images from"),
        (changed(3, chosen_score=2.0, rejected_score=1.0), r"\(scores of the pairs from"),
        pytest.param(
            pair_set(reversed(list(toy_pairs()))),
            "chosen images from .* prompts of the pairs from",
            marks=pytest.mark.slow,
        ),
        (
            pair_set(PreferencePair(pair.prompt, pair.rejected, pair.chosen) for pair in toy_pairs()),
            r"\(chosen images from (\w+) to (\w+); rejected images from \2 to \1\)",
        ),
        (toy_pairs(7), "pairs from 8 to 7"),
    ],
)
def test_dpo_on_other_pairs(begun, pairs, message):
    assert_refused(begun, message, lambda: trained(begun, updates=2, resume=True, pairs=pairs))


def test_dpo_with_other_settings_or_fewer_updates(begun):
    rate = {"learning_rate": 0.5, "updates": 2}
    cases = {"rank from 4 to 2": {"adapter": {"rank": 2}}, "learning_rate from 0.01 to 0.5": {"learning": rate}}
    for message, changes in cases.items():
        assert_refused(begun, message, lambda changes=changes: trained(begun, resume=True, **changes))
    assert_refused(begun, "already holds a run", lambda: trained(begun))


def test_where_caches_lie_and_when_they_are_filled_may_change(begun, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    trained(folder, updates=2, resume=True, cache_folder=str(tmp_path / "cache"), encode_ahead=False)
    assert [line["update"] for line in read_metrics(folder)] == [1, 2]


def test_the_same_base_and_pairs_go_on_wherever_they_lie(begun, tmp_path):
    """Files instead of bytes, another name of the records, and folders of the same pipeline."""
    for index, pair in enumerate(toy_pairs()):
        for side in ("chosen", "rejected"):
            (tmp_path / f"{index}-{side}.png").write_bytes(pair.encoded(side))
    moved = [
        replace(pair, chosen=tmp_path / f"{i}-chosen.png", rejected=tmp_path / f"{i}-rejected.png", name=f"row {i}")
        for i, pair in enumerate(toy_pairs())
    ]
    trained(tmp_path / "run", updates=1)
    trained(tmp_path / "run", updates=2, resume=True, pairs=pair_set(moved))
    assert [line["update"] for line in read_metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("name", slow_but(("grpo",), TRAINERS))
def test_online_runs_with_something_else(tmp_path, monkeypatch, name):
    def attempt(resume=True, **changes):
        TRAINERS[name](tmp_path, preflight=False, **{"learning": learning(2)} | changes).train(resume=resume)

    attempt(resume=False, learning=learning(1))
    for what in ("unet", "betas"):
        make, message = bases()[what]
        assert_refused(tmp_path, message.rstrip(")\\"), lambda make=make: attempt(pipe=make()))
    other = "clip-score" if name == "reward_gradient" else "jpeg-incompressibility"
    assert_refused(tmp_path, f"rewards from .* to {other}", lambda: attempt(reward=other))
    assert_refused(tmp_path, r"seed from 0 to 1", lambda: attempt(seed=1))
    with monkeypatch.context() as patched:
        patched.setattr("tests.trainers.online_runs.PROMPTS", PROMPTS[::-1])
        assert_refused(tmp_path, r"prompts from 3 \(\w+\) to 3 \(\w+\)", attempt)
    attempt()
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2]
