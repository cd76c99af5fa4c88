"""Vision-language models as rewards: P("Yes") against a writing of its own, and grades of checked answers."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from rpo.curation.vlm.graded_judge import GradedJudge
from rpo.curation.vlm.vqa_score import VqaScore
from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.rewards import RewardError, load_reward
from rpo.rewards.base import CanLeave, ask
from rpo.rewards.version import version_of
from tests.curation.vlm.fake_server import Response, fake_server, in_turn, text_of
from tests.curation.vlm.tiny_vlm import save_tiny_vlm, tiny_processor

IMAGES = (torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
PROMPTS = ["a fox", "two grey cats asleep on a red sofa", 'a sign that says "OPEN"']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm"))


@torch.no_grad()
def by_hand(folder, picture, prompt):
    """P of every letter that could begin the answer: alone, without padding, by a plain forward."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder).eval(), tiny_processor()
    text = f'user: <image>\nDoes this figure show "{prompt}"? Please answer yes or no.assistant: '
    inputs = processor(images=Image.fromarray(picture), text=text, return_tensors="pt")
    logits = model(**inputs).logits[0, -1].double()
    chances = (logits - logits.logsumexp(0)).exp()
    return [chances[processor.tokenizer.convert_tokens_to_ids(letter)].item() for letter in "YN"]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_score_is_the_probability_of_yes(folder, batch_size):
    expected = torch.tensor([by_hand(folder, *one) for one in zip(to_pixels(IMAGES), PROMPTS, strict=True)])
    scores, info = VqaScore(str(folder), batch_size=batch_size)(IMAGES, PROMPTS)
    assert torch.allclose(scores, expected[:, 0].float(), rtol=1e-3, atol=1e-9)
    assert torch.allclose(info["answers"], expected.sum(1).float(), rtol=1e-3, atol=1e-9)
    assert len(set(scores.tolist())) == 3 and scores.min() > 0 and scores.max() < 1


def test_image_and_prompt_count(folder):
    reward = VqaScore(str(folder))
    first = reward(IMAGES[:1], PROMPTS[:1])[0]
    assert reward(IMAGES[1:2], PROMPTS[:1])[0] != first != reward(IMAGES[:1], PROMPTS[1:2])[0]


def test_it_is_a_reward_by_name_with_info(folder):
    reward = load_reward(f"vqa-score:{folder}")
    found = ask(reward, IMAGES, PROMPTS, name="vqa-score")
    assert torch.equal(found.values, reward(IMAGES, PROMPTS)[0]) and set(found.info) == {"answers"}
    assert isinstance(reward, CanLeave) and not reward.is_differentiable
    reward.leave()
    assert torch.equal(found.values, reward(IMAGES, PROMPTS)[0])


def test_versions_are_of_the_weights(folder, tmp_path):
    rewards = [load_reward(f"{name}:{folder}") for name in ("vqa-score", "graded-judge")]
    shutil.copytree(folder, tmp_path / "other")
    before = [version_of(reward) for reward in rewards]
    assert before == [version_of(load_reward(f"{name}:{tmp_path / 'other'}")) for name in ("vqa-score", "graded-judge")]
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    after = [version_of(load_reward(f"{name}:{tmp_path / 'other'}")) for name in ("vqa-score", "graded-judge")]
    assert not set(before) & set(after) and all(one.startswith("weights ") for one in before + after)
    assert ask(rewards[0], IMAGES, PROMPTS, name="asked after").values.isfinite().all()


def test_the_version_of_a_judge_behind_a_server_is_its_name():
    for kind in (GradedJudge, VqaScore):
        places = ((1, "a"), (2, "a"), (1, "b"))
        one, same, other = (version_of(kind(f"http://localhost:{n}/v1#{name}")) for n, name in places)
        assert one == same != other


def test_a_tokenizer_that_cannot_tell_the_answers_apart_is_refused(folder, monkeypatch):
    monkeypatch.setattr("rpo.curation.vlm.vqa_score.ANSWERS", ("Yes", "You"))
    with pytest.raises(InputError, match="same token"):
        VqaScore(str(folder))(IMAGES, PROMPTS)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(RewardError, match="does not load"):
        ask(load_reward(f"vqa-score:{tmp_path}"), IMAGES, PROMPTS, name="vqa-score")


def first_tokens(**chances):
    """What a server says of a first token; `chances` by the token's text."""
    likeliest = [{"token": token, "logprob": math.log(chance)} for token, chance in chances.items()]
    token = max(likeliest, key=lambda one: one["logprob"])
    return Response(token["token"], logprobs={"content": [{**token, "top_logprobs": likeliest}]})


def asked_for_yes(behave, images=IMAGES, prompts=PROMPTS):
    with fake_server(behave) as server:
        found = ask(load_reward(f"vqa-score:{server.url}#qwen"), images, prompts, name="vqa-score", may_fail=True)
        return found, server.requests


def test_a_server_is_asked_for_the_probability_of_yes():
    chances = {prompt: {"Yes": 0.1 + 0.2 * n, "No": 0.3, "I": 0.05} for n, prompt in enumerate(PROMPTS)}
    told = {f'Does this figure show "{prompt}"? Please answer yes or no.': one for prompt, one in chances.items()}
    found, requests = asked_for_yes(lambda request: first_tokens(**told[text_of(request)]))
    assert found.values.tolist() == pytest.approx([0.1, 0.3, 0.5]) and not found.failures
    assert found.info["answers"] == pytest.approx(0.6)
    assert all((one["max_tokens"], one["logprobs"], one["top_logprobs"]) == (1, True, 20) for one in requests)


def test_an_answer_that_is_not_told_is_less_likely_than_all_that_are():
    found, _ = asked_for_yes(lambda _: first_tokens(No=0.9, Nope=0.05))
    assert found.values.tolist() == [0, 0, 0] and found.info["answers"] == pytest.approx(0.9)


def test_a_token_that_is_written_in_two_ways_counts_with_both():
    both = [{"token": "Yes", "logprob": math.log(0.25)}] * 2
    found, _ = asked_for_yes(lambda _: Response("Yes", logprobs={"content": [{**both[0], "top_logprobs": both}]}))
    assert found.values.tolist() == pytest.approx([0.5] * 3)


NO_CHANCES = {
    "no logprobs": Response("Yes"),
    "empty logprobs": Response("Yes", logprobs={"content": []}),
    "nothing of the first": Response("Yes", logprobs={"content": [{"token": "Yes", "logprob": 0, "top_logprobs": []}]}),
    "neither answer": first_tokens(Maybe=0.9, Perhaps=0.05),
    "above one": Response(
        "Yes", logprobs={"content": [{"token": "Yes", "top_logprobs": [{"token": "Yes", "logprob": 0.5}]}]}
    ),
    "text for a number": Response("Yes", logprobs={"content": [{"top_logprobs": [{"token": "Yes", "logprob": "0"}]}]}),
    "no list": Response("Yes", logprobs={"content": "Yes"}),
}


@pytest.mark.parametrize("name", NO_CHANCES)
def test_a_server_that_tells_no_probability_is_a_failed_score_and_never_0(name):
    found, _ = asked_for_yes(
        lambda request: NO_CHANCES[name] if PROMPTS[1] in text_of(request) else first_tokens(Yes=0.5)
    )
    assert found.values[[0, 2]].tolist() == pytest.approx([0.5, 0.5]) and math.isnan(found.values[1])
    assert list(found.failures) == [1]


def grade(number, reason="it is there"):
    return Response(json.dumps({"reason": reason, "grade": number}))


def graded(*responses, images=IMAGES, prompts=PROMPTS):
    with fake_server(in_turn(responses)) as server:
        reward = load_reward(f"graded-judge:{server.url}#qwen")
        reward._asks["concurrency"] = 1  # so that the answers come in the order of the images
        found = ask(reward, images, prompts, name="judge", may_fail=True)
        return found, server.requests


def test_grades_become_tenths():
    found, requests = graded(grade(7), grade(0), grade(10))
    assert found.values.tolist() == pytest.approx([0.7, 0, 1]) and not found.failures
    assert {one["model"] for one in requests} == {"qwen"} and {one["temperature"] for one in requests} == {0.0}
    assert [json.dumps(prompt) in text_of(one) for prompt, one in zip(PROMPTS, requests, strict=True)] == [True] * 3


WRONG = {
    "beyond": grade(11),
    "below": grade(-1),
    "half": grade(7.5),
    "text": grade("7"),
    "truth": grade(True),
    "none": grade(None),
    "no reason": Response('{"grade": 7}'),
    "two": Response('{"reason": "a", "grade": 7} {"reason": "a", "grade": 8}'),
    "prose": Response("I would say 7 of 10."),
    "nothing": Response(""),
    "refused": Response(None, message={"refusal": "I cannot judge people"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_no_grade_is_a_failed_score_and_never_0(name):
    found, _ = graded(grade(7), WRONG[name], grade(3))
    assert found.values[[0, 2]].tolist() == pytest.approx([0.7, 0.3]) and math.isnan(found.values[1])
    assert list(found.failures) == [1]


def test_a_server_that_is_away_ends_the_run():
    with fake_server(in_turn([grade(7)])) as server:
        place = server.url
    reward = load_reward(f"graded-judge:{place}#qwen")
    reward._asks["max_retries"] = 0
    with pytest.raises(RewardError, match="Unavailable"):
        ask(reward, IMAGES, PROMPTS, name="judge", may_fail=True)


@pytest.mark.parametrize("name", ["graded-judge", "vqa-score"])
def test_a_server_without_a_model_is_refused(name):
    with pytest.raises(InputError, match="#MODEL"):
        load_reward(f"{name}:http://localhost:8000/v1")


def test_a_model_on_this_machine_is_asked_too_and_its_garbage_is_none(folder):
    reward = GradedJudge(str(folder))
    reward._asks["max_tokens"] = 8
    found = ask(load_reward(reward), IMAGES, PROMPTS, name="judge", may_fail=True)
    assert found.values.isnan().all() and len(found.failures) == 3
    reward.leave()


def test_a_model_on_this_machine_that_answers(folder, monkeypatch):
    from rpo.curation.vlm.chat import Reply
    from rpo.curation.vlm.local import LocalChat

    said = [Reply('{"reason": "a", "grade": 4}'), Reply("no"), Reply('Well: {"reason": "b", "grade": 9}')]
    asked = []
    monkeypatch.setattr(LocalChat, "_generate", lambda self, questions: asked.extend(questions) or said)
    found = ask(load_reward(f"graded-judge:{folder}"), IMAGES, PROMPTS, name="judge", may_fail=True)
    assert found.values[[0, 2]].tolist() == pytest.approx([0.4, 0.9]) and "no" in found.failures[1]
    assert all("JSON schema" in one.text for one in asked)
