"""A real vision-language model from a folder: batches, greed, sampling, the cache, and its garbage as faults."""

import numpy as np
import pytest
import torch
from PIL import Image

from rpo.curation.components import load_critic, load_instructor
from rpo.curation.curate_config import ChatConfig
from rpo.curation.judge import load_judge
from rpo.curation.records import Critique, Fault, Problem
from rpo.curation.store.address import Store
from rpo.curation.vlm.answers import AnswerCache
from rpo.curation.vlm.chat import Question, Reply
from rpo.curation.vlm.local import LocalChat
from tests.curation.vlm.tiny_vlm import save_tiny_vlm, tiny_processor

RNG = np.random.default_rng(0)
IMAGES = [Image.fromarray(RNG.integers(0, 256, (40, 40 + 8 * index, 3), dtype=np.uint8)) for index in range(3)]
QUESTIONS = [
    Question("What is this?", (IMAGES[0],)),
    Question("And what on earth might that be, if one may ask?", (IMAGES[1],)),
    Question("Which?", (IMAGES[0], IMAGES[2])),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm"))


def chat(folder, cache=None, **changes):
    settings = {"kind": "local", "model": str(folder), "device": "cpu", "max_tokens": 12, "cache": bool(cache)}
    return LocalChat(ChatConfig(**settings | changes), AnswerCache(cache and Store(cache)))


def test_a_batch_says_what_its_items_say_alone(folder):
    model = chat(folder)
    together = model(QUESTIONS)
    assert together == [model([question])[0] for question in QUESTIONS]
    assert len({reply.text for reply in together}) == 3
    assert together == model(QUESTIONS), "greedy answers are always the same"


def test_image_and_text_decide_the_answer(folder):
    model = chat(folder)
    (first,), (other_image,) = model([QUESTIONS[0]]), model([Question("What is this?", (IMAGES[1],))])
    assert first != other_image


def test_a_long_answer_is_known_to_be_cut(folder):
    model = chat(folder)
    end = model._model.generation_config.eos_token_id
    letters = torch.arange(12)
    letters[letters == end] = end - 1
    assert model._is_cut(letters) and not model._is_cut(letters[:5])
    letters[-1] = end
    assert not model._is_cut(letters)


def test_sampled_answers_depend_on_seed_and_question_only(folder):
    state = torch.random.get_rng_state()
    model = chat(folder, temperature=1.5, seed=3)
    together = model(QUESTIONS)
    assert together == [model([question])[0] for question in QUESTIONS[::-1]][::-1]
    assert together != chat(folder, temperature=1.5, seed=4)(QUESTIONS) != chat(folder)(QUESTIONS)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_answers_are_kept_and_only_what_is_new_is_asked(folder, tmp_path, monkeypatch):
    model = chat(folder, tmp_path)
    first = model(QUESTIONS[:2])
    asked = []
    generate = model._generate
    monkeypatch.setattr(model, "_generate", lambda questions: asked.append(questions) or generate(questions))
    assert model([QUESTIONS[1], QUESTIONS[2], QUESTIONS[0]])[::2] == first[::-1]
    assert asked == [[QUESTIONS[2]]]
    assert len(list(tmp_path.rglob("*.json"))) == 3
    assert chat(folder, tmp_path, max_tokens=5)(QUESTIONS[:1]) != first[:1]


def test_its_garbage_is_a_fault_with_its_words(folder):
    settings = {"kind": "local", "model": str(folder), "max_tokens": 12, "device": "cpu"}
    critic = load_critic(ChatConfig(**settings, batch_size=2))
    assert (critic.batch_size, critic.concurrency) == (2, 1)
    for fault in critic(IMAGES[:2], ["a fox", "a very long caption about a fox"]):
        assert isinstance(fault, Fault) and fault.kind == "parse_error" and fault.raw
    critique = Critique(problems=(Problem(what="no fox", severity=3),), overall=2)
    (fault,) = load_instructor(ChatConfig(**settings))(IMAGES[:1], ["a fox"], [critique])
    assert isinstance(fault, Fault)
    (verdict,) = load_judge(ChatConfig(**settings)).orders(IMAGES[:1], IMAGES[1:2], ["a fox"])
    assert isinstance(verdict.forward, Fault) and isinstance(verdict.verdict, Fault)


def test_a_good_answer_goes_through_the_same_parser(folder, monkeypatch):
    critic = load_critic(ChatConfig(kind="local", model=str(folder), device="cpu"))
    asked = []

    def answering(questions):
        asked.extend(questions)
        return [Reply('```json\n{"problems": [], "overall": 10}\n```')] * len(questions)

    monkeypatch.setattr(critic._chat, "_generate", answering)
    assert critic(IMAGES[:1], ["a fox"]) == [Critique(problems=(), overall=10)]
    assert '"a fox"' in asked[0].text and "JSON schema" in asked[0].text, "nothing else tells the schema"


def test_the_identity_tells_the_weights(folder, tmp_path):
    one, same = chat(folder).identity, chat(save_tiny_vlm(tmp_path / "same")).identity
    other = chat(save_tiny_vlm(tmp_path / "other", seed=1)).identity
    assert one["revision"] == same["revision"] != other["revision"]
    assert one["dtype"] == "torch.float32" and chat(folder, dtype="bfloat16").identity["dtype"] == "torch.bfloat16"


def test_what_cannot_be_loaded_is_said(folder, tmp_path):
    with pytest.raises(
        ValueError, match="^a local model is to be asked, but model is empty; give its folder or hub id"
    ):
        chat("")
    with pytest.raises(ValueError, match="does not load as an image-text-to-text model of transformers: "):
        chat(tmp_path)
    with pytest.raises(
        ValueError, match="sets 'dtype' to 'int8', but one of auto, float32, float16, bfloat16 is needed"
    ):
        chat(folder, dtype="int8")
    mute = save_tiny_vlm(tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template or tokenizer in its processor, so it cannot be asked"):
        chat(mute)


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "seed"])
def test_only_a_server_can_be_left_to_choose(folder, name):
    with pytest.raises(ValueError, match=f"^a local model is to be asked, with .*{name} None.*; expected a number for"):
        chat(folder, **{name: None})


def test_the_processor_is_what_the_checkpoint_says():
    assert tiny_processor().chat_template.startswith("{% for message in messages %}")
