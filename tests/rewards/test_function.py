import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

from rpo.data.prompts import AnnotatedPrompt
from rpo.errors import InputError
from rpo.rewards import adapt, load_reward, load_rewards
from rpo.rewards.base import RewardError, ask, score
from rpo.rewards.function import FunctionReward, takes_metadata


def test_the_function_sees_images_and_prompts():
    images = torch.rand(2, 3, 8, 8)
    seen = []

    def recording(images, prompts):
        seen.append((images, prompts))
        return [3, 4]

    assert FunctionReward(recording)(images, ["a", "b"]).tolist() == [3, 4]
    assert seen[0][0] is images and seen[0][1] == ["a", "b"]


def test_a_wrapped_function_fails_with_the_words_of_a_bare_one():
    def short(images, prompts):
        return [1.0]

    messages = []
    for reward in (short, FunctionReward(short)):
        with pytest.raises(RewardError) as caught:
            score(reward, torch.rand(2, 3, 8, 8), ["a", "b"], name="r")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("reward 'r', image 0 ('a') and 1 more: returned 1 numbers for 2 images; expected ")


PROMPTS = [AnnotatedPrompt("three cats", {"count": 3}), AnnotatedPrompt("a dog")]


def of_trl(images, prompts, metadata):
    """As TRL's guide and ddpo-pytorch write a reward."""
    assert isinstance(images, torch.Tensor)
    assert [type(prompt) for prompt in prompts] == [str, str]
    return images.mean((1, 2, 3)) + torch.tensor([float(one.get("count", 0)) for one in metadata]), {}


class AsObject:
    def __call__(self, images, prompts, metadata):
        return of_trl(images, prompts, metadata)


class AsModule(nn.Module):
    def forward(self, images, prompts, metadata):
        return of_trl(images, prompts, metadata)


@pytest.mark.parametrize("reward", [of_trl, AsObject(), AsObject, AsModule(), torch.no_grad()(of_trl)])
def test_three_arguments_are_known_by_the_signature_and_metadata_come_with_the_prompts(reward):
    assert score(load_reward(reward), torch.ones(2, 3, 8, 8), PROMPTS, name="r").tolist() == [4, 1]
    weighted = load_rewards(reward)
    assert weighted(torch.ones(2, 3, 8, 8), PROMPTS).tolist() == [4, 1]
    assert weighted.with_gradient(torch.ones(2, 3, 8, 8), PROMPTS).tolist() == [4, 1]


def test_without_metadata_each_prompt_has_an_empty_dict():
    assert score(load_reward(of_trl), torch.zeros(2, 3, 8, 8), ["a", "b"], name="r").tolist() == [0, 0]


def test_a_reward_may_not_spoil_the_metadata_for_the_next():
    def spoiling(images, prompts, metadata):
        for one in metadata:
            one.clear()
        return [0.0] * len(images)

    score(load_reward(spoiling), torch.zeros(2, 3, 8, 8), PROMPTS, name="r")
    assert PROMPTS[0].metadata == {"count": 3}


def defaulted(images, prompts, metadata=None):
    return [0.0] * len(images)


def keyword(images, prompts, *, scale=2.0):
    return [scale] * len(images)


def test_rules_of_the_signature():
    assert takes_metadata(lambda image, prompt, anything: [])
    assert takes_metadata(defaulted)
    assert not takes_metadata(keyword)
    assert not takes_metadata(functools.partial(of_trl, metadata=()))
    assert not takes_metadata(lambda images, _: [])


UNCLEAR = {
    "everything": lambda *args: [],
    "a third of its own": lambda images, prompts, scale=1.0: [],
    "one": lambda images: [],
    "four": lambda images, prompts, metadata, more: [],
    "a keyword": eval("lambda images, prompts, *, scale: []"),
    "no signature": max,
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_a_signature_leaves_open_is_refused_and_adapt_named(name):
    with pytest.raises(InputError, match="rpo.rewards.adapt"):
        load_reward(UNCLEAR[name])


def test_adapt_says_what_the_signature_does_not():
    def any_number(*given):
        return [float(len(given))] * len(given[0])

    images = torch.zeros(2, 3, 8, 8)
    assert adapt(any_number, metadata=True)(images, PROMPTS).tolist() == [3, 3]
    assert load_reward(adapt(any_number, metadata=False))(images, PROMPTS).tolist() == [2, 2]


def test_every_form_of_images_shows_the_same_pixels():
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    seen = {}

    def looking(form):
        @adapt(images=form)
        def look(images, prompts):
            seen[form] = images
            return [0.0] * len(images)

        return look

    for form in ("tensor", "pil", "uint8"):
        look = looking(form)
        assert load_reward(look) is look
        score(look, images, ["a", "b"], name="r")
    expected = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert torch.equal(seen["tensor"], images)
    assert seen["uint8"].dtype == np.uint8 and np.array_equal(seen["uint8"], expected)
    assert [image.mode for image in seen["pil"]] == ["RGB", "RGB"]
    assert np.array_equal(np.stack([np.asarray(image) for image in seen["pil"]]), expected)


def test_of_info_the_means_of_numbers_are_kept():
    def telling(images, prompts, metadata):
        info = {"f1": np.array([0.5, 1.0]), "right": [True, False], "said": ["yes", "no"], "all": 3.0, "odd": [1.0]}
        return np.array([1.0, 2.0]), info

    answered = ask(load_reward(telling), torch.zeros(2, 3, 8, 8), ["a", "b"], name="r")
    assert answered.values.tolist() == [1, 2]
    assert answered.info == {"f1": 0.75, "right": 0.5}


def test_declared_info_may_be_anything_and_has_to_be_there():
    told = adapt(lambda images, prompts: ([1.0, 2.0], "words"), returns="scores_and_info")
    assert ask(told, torch.zeros(2, 3, 8, 8), ["a", "b"], name="r").info == {}
    bare = adapt(lambda images, prompts: torch.zeros(2), returns="scores_and_info")
    with pytest.raises(RewardError, match="scores_and_info.*expected a pair"):
        score(bare, torch.zeros(2, 3, 8, 8), ["a", "b"], name="r")


def test_a_gradient_comes_through():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    values = load_rewards(of_trl).with_gradient(images, PROMPTS)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert torch.allclose(gradient, torch.full_like(gradient, 1 / 48))


def test_the_evidence_of_a_fault_has_the_metadata(tmp_path):
    def broken(images, prompts, metadata):
        raise RuntimeError("no")

    with pytest.raises(RewardError) as caught:
        score(load_reward(broken), torch.zeros(2, 3, 8, 8), PROMPTS, name="r", evidence=tmp_path)
    first, second = json.loads((caught.value.saved_in / "fault.json").read_text())["images"]
    assert first["metadata"] == {"count": 3} and "metadata" not in second


@pytest.mark.parametrize("given", [{"images": "bytes"}, {"returns": "info"}])
def test_unknown_forms_are_refused(given):
    with pytest.raises(InputError, match="expected one of"):
        adapt(of_trl, **given)


def test_a_class_is_no_function():
    with pytest.raises(InputError, match="instance"):
        adapt(AsObject, images="pil")
