"""What DPO says of a set before it trains: captions that are cut, rows left out, pairs of one image; and where sets
come from."""

import io
import logging

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from rpo.data.preference import SIDES, PreferencePair, encode_png, pair_set
from rpo.data.writers import write_pairs
from rpo.models.captions import load_tokenizer, surely_cut
from rpo.models.checkpoint import Checkpoint
from rpo.trainers.dpo import DPO
from rpo.trainers.rollouts.draw import Rollouts
from rpo.trainers.rollouts.settings import RolloutConfig
from tests.tiny import tiny_sd, tiny_tokenizer
from tests.trainers.pair_runs import toy_pairs, trainer_of

LONG = "a red circle above a blue square and " * 3  # 111 letters; the tiny tokenizer makes one token of each


def with_prompts(*prompts):
    pairs = toy_pairs(len(prompts))
    return pair_set([PreferencePair(text, one.chosen, one.rejected) for text, one in zip(prompts, pairs, strict=True)])


def test_cut_captions_are_in_the_plan_with_a_cold_and_a_warm_cache(tmp_path):
    pairs = with_prompts(LONG + "one", LONG + "two", "short", "x" + LONG)
    for run_name in ("cold", "warm"):
        settings = {"updates": 1, "cache_folder": str(tmp_path / "cache"), "caption_dropout": 0.0}
        trainer = trainer_of(tmp_path / run_name, pairs=pairs, **settings)
        trainer.train()
        assert (
            "  3 of 4 captions are too long for the 77 tokens of the text encoder and are cut, and 2 of them became "
            "equal to another"
        ) in trainer.plan().splitlines()
    assert "captions" not in trainer_of(tmp_path / "short").plan()


@pytest.mark.parametrize("length", [74, 75, 76, 80])
def test_a_caption_counts_as_cut_exactly_where_the_pipeline_cuts_it(length):
    pipe, caption = tiny_sd(), "a " * length
    handler = logging.StreamHandler(io.StringIO())
    logger = diffusers_logging.get_logger("diffusers")
    logger.addHandler(handler)
    try:
        one, other = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (caption, caption + "b"))
    finally:
        logger.removeHandler(handler)
    said = "".join(Checkpoint(pipe).notes_on([caption, caption + "b"]))
    assert ("2 of them became equal" in said) == (length > 75)
    assert torch.equal(one, other) == (length >= 75)
    assert (
        ("1 of 2" in said) == (length == 75) and ("2 of 2" in said) == (length > 75) and (said == "") == (length < 75)
    )
    if length == 75:  # the uncut one is all that is left of the other
        assert said.endswith("and 1 of them became equal to another")


def test_learnt_words_count_as_the_tokens_that_they_stand_for():
    pipe = tiny_sd()
    pipe.tokenizer.add_tokens(["<cat>", *(f"<cat>_{index}" for index in range(1, 90))])
    assert "1 of 1 captions are too long" in Checkpoint(pipe).notes_on(["a <cat>"])[0]


def test_words_alone_tell_which_captions_clip_surely_cuts():
    base = "word " * 75
    assert str(surely_cut([base])) == ""
    said = str(surely_cut([base + "a", base + "b", "short"]))
    assert said.startswith("2 of 3 captions are too long for the 77 tokens of CLIP (at least; --model counts them)")
    assert said.endswith("2 of them became equal to another")


def test_a_tokenizer_is_loaded_without_its_checkpoint(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path).model_max_length == 77
    assert load_tokenizer("shapes").model_max_length == 16
    with pytest.raises(ValueError, match="nowhere has no tokenizer that can be loaded .*; correct --model"):
        load_tokenizer(tmp_path / "nowhere")


def reencoded(data):
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


@pytest.mark.parametrize("encode_ahead", [True, False])
def test_a_pair_of_one_image_in_two_files_is_refused_before_it_is_trained_on(tmp_path, encode_ahead):
    good, (one,) = toy_pairs(3), toy_pairs(4)[3:]
    same = PreferencePair("p", one.chosen, reencoded(one.chosen), name="metadata.jsonl:7")
    pairs = pair_set([*good, same])
    trainer = trainer_of(tmp_path, pairs=pairs, encode_ahead=encode_ahead)
    with pytest.raises(ValueError, match=r"^metadata\.jsonl:7: the two images are one and the same; expected a better"):
        trainer.train()
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text("utf-8")


def test_a_pair_that_differs_outside_the_crop_is_trained_on(tmp_path):
    wide = np.zeros((64, 96, 3), np.uint8)
    other = wide.copy()
    other[:, :4] = 255
    pairs = pair_set([PreferencePair("p", encode_png(wide), encode_png(other))])
    one = {"pairs_per_update": 1, "learning": {"micro_batch": 1}}
    assert trainer_of(tmp_path, pairs=pairs, updates=2, **one).train().updates == 2


def test_the_same_bytes_on_both_sides_are_refused_at_reading():
    image = toy_pairs(1)[0].chosen
    with pytest.raises(ValueError, match="^mine:0: the two images are one and the same"):
        pair_set([PreferencePair("p", image, image)], origin="mine")


def test_a_trainer_takes_what_holds_pairs(tmp_path):
    write_pairs(tmp_path / "pairs", toy_pairs(2))
    rows = [{"prompt": one.prompt, **{side: one.decode(side) for side in SIDES}} for one in toy_pairs(2)]
    for source in (str(tmp_path / "pairs"), tmp_path / "pairs", rows, list(toy_pairs(2))):
        assert len(DPO(source).pairs) == 2
    with pytest.raises(ValueError, match="^pairs are a function; expected a folder"):
        DPO(lambda: rows)
    with pytest.raises(ValueError, match="^no-such-folder/anywhere/pairs does not exist"):
        DPO("no-such-folder/anywhere/pairs")


@pytest.mark.parametrize("prompts", ["cat", b"cat", {"a": 1}, 3])
def test_prompts_that_are_no_list_are_refused_in_one_sentence(prompts):
    with pytest.raises(ValueError, match=r"^prompts are a \w+, but a list of texts is needed; give \[text, …\]"):
        Rollouts(None, prompts, None, RolloutConfig(), seed=0)  # pyright: ignore


@pytest.mark.parametrize("prompt", ["a\0b", "\ud800"])
def test_prompts_that_are_no_text_are_refused(prompt):
    with pytest.raises(ValueError, match="^prompt 1 holds "):
        Rollouts(None, ["a", prompt], None, RolloutConfig(), seed=0)  # pyright: ignore
