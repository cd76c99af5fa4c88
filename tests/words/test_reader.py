from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy import ndimage

from rpo.errors import InputError
from rpo.rewards import RewardError, load_reward
from rpo.rewards.ocr import OCR
from rpo.words.prompts import LETTERS, is_out_of_domain, prompt_of, sample_words
from rpo.words.reader import read_word
from rpo.words.world import (
    HEIGHT,
    MISTAKES,
    SIZES,
    WIDTH,
    Setting,
    draw_setting,
    misspelt,
    render,
    training_images,
)


def drawn(count, seed):
    rng = np.random.default_rng(seed)
    spelt = [word for split in ("train", "in_domain", "out_of_domain") for word in sample_words(split, count, seed)]
    return spelt, [render(draw_setting(word, rng)) for word in spelt]


def as_images(pixels):
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def test_it_reads_clean_words_right():
    spelt, images = drawn(100, seed=1)
    assert [read_word(image).word for image in images] == spelt


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("letter", LETTERS)
def test_it_knows_every_letter_in_every_place(letter, size):
    vowel, consonant = ("E" if letter != "E" else "U"), ("R" if letter != "R" else "L")
    for place in range(5):
        other = [consonant, vowel] if letter in "AEIOU" else [vowel, consonant]
        word = "".join(letter if at == place else other[(at - place + 1) % 2] for at in range(5))
        for shift in (-1, 1):
            assert read_word(render(Setting(word, size, shift, -shift))).word == word


def test_a_misspelt_word_is_wrong():
    rng = np.random.default_rng(2)
    spelt = sample_words("train", 60, seed=2)
    images = as_images([render(draw_setting(misspelt(word, 1.0, rng), rng)) for word in spelt])
    assert load_reward("words-judge")(images, [prompt_of(word) for word in spelt]).sum() == 0


def test_noise_and_blanks_say_nothing():
    rng = np.random.default_rng(3)
    for level in (0, 128, 255):
        assert read_word(np.full((HEIGHT, WIDTH, 3), level, np.uint8)).word == ""
    for spread in (30, 127):
        noise = np.clip(rng.normal(128, spread, (20, HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
        assert {read_word(one).word for one in noise} == {""}
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, (20, HEIGHT, WIDTH, 3)), (0, 3, 3, 0))
    smooth = (128 + 127 * smooth / abs(smooth).max()).astype(np.uint8)
    assert all("?" in word or word == "" for word in (read_word(one).word for one in smooth))


def test_a_letter_too_many_or_a_stain_is_not_overlooked():
    image = render(Setting("CAT"))
    assert read_word(render(Setting("CATA"))).word == "CATA"
    stained = image.copy()
    stained[3:13, 40:47] = 30
    assert read_word(stained).word not in ("CAT", "")
    upside_down = image[::-1, ::-1]
    assert read_word(upside_down).word != "CAT"


def test_a_little_blur_and_noise_are_no_matter():
    rng = np.random.default_rng(4)
    spelt, images = drawn(20, seed=4)
    soft = [ndimage.gaussian_filter(image.astype(float), (0.5, 0.5, 0)) for image in images]
    noisy = [np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8) for image in soft]
    assert np.mean([read_word(image).word == word for image, word in zip(noisy, spelt, strict=True)]) >= 0.95


def test_as_a_reward_it_says_yes_or_no():
    judge = load_reward("words-judge")
    images = as_images([render(Setting("CAT")), render(Setting("CUT")), np.full((HEIGHT, WIDTH, 3), 200, np.uint8)])
    assert judge(images, [prompt_of("CAT")] * 3).tolist() == [1, 0, 0]
    with pytest.raises(RewardError, match="none of the words world"):
        judge(images, [prompt_of("CAT"), "a dog", prompt_of("CAT")])
    with pytest.raises(InputError, match="16, 48"):
        judge(torch.zeros(1, 3, 64, 64), [prompt_of("CAT")])


def test_training_images_are_misspelt_as_often_as_said():
    images, captions = training_images(5, 400, mistakes=0.25)
    read = [read_word(image).word for image in images]
    asked = [caption.split('"')[1] for caption in captions]
    pairs = [pair for one, other in zip(asked, read, strict=True) for pair in zip(one, other, strict=True)]
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    assert 0.2 <= len(wrong) / len(pairs) <= 0.27
    assert all(MISTAKES[one] == other for one, other in wrong)
    assert not any(is_out_of_domain(word) for word in read)
    again, _ = training_images(5, 40, mistakes=0.25)
    assert (again == images[:40]).all()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rapidocr") is None, reason="needs the extra rpo[ocr]")
def test_judge_and_ocr_agree():
    rng = np.random.default_rng(6)
    spelt = [word for split in ("train", "out_of_domain") for word in sample_words(split, 60, seed=6)]
    images = as_images([render(draw_setting(misspelt(word, 0.15, rng), rng)) for word in spelt])
    prompts = [prompt_of(word) for word in spelt]
    judged, read = load_reward("words-judge")(images, prompts), OCR(images, prompts)
    assert 0.3 <= judged.mean() <= 0.8
    assert ((read == 1) == (judged == 1)).double().mean() >= 0.97
    right = as_images([render(draw_setting(word, rng)) for word in spelt])
    assert (OCR(right, prompts) == 1).double().mean() >= 0.95
