import random
import string
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rpo.errors import InputError
from rpo.rewards import RewardError, load_reward, score
from rpo.rewards import ocr as module
from rpo.rewards.ocr import OCR, OcrReward, asked_text, distance, similarity


def reading(*texts):
    """A reward that reads these pieces from one image after the other, and notes the pixels."""
    reward, waiting, seen = OcrReward(), list(texts), []

    def engine(pixels):
        seen.append(pixels)
        return SimpleNamespace(txts=waiting.pop(0))

    reward._engine = engine
    return reward, seen


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("cat", "cat", 0),
        ("intention", "execution", 5),
    ],
)
def test_distances_of_textbooks(one, other, expected):
    assert distance(one, other) == expected == distance(other, one)


def test_the_distance_is_that_of_its_recursion():
    def recursive(a, b):
        if not a or not b:
            return len(a) + len(b)
        change = recursive(a[1:], b[1:]) + (a[0] != b[0])
        return min(recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1, change)

    rng = random.Random(0)
    for _ in range(60):
        one, other = ("".join(rng.choices("ab", k=rng.randint(0, 5))) for _ in range(2))
        assert distance(one, other) == recursive(one, other)


@pytest.mark.parametrize(
    ("read", "expected"),
    [("cat", 1.0), ("", 0.0), ("cut", 2 / 3), ("ca", 2 / 3), ("xyz", 0.0), ("somethingelse", 0.0), ("acatsat", 1.0)],
)
def test_the_similarity_is_flow_grpos(read, expected):
    assert similarity(read, "cat") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('the word "CAT"', "cat"),
        ('a sign "New York" by night', "newyork"),
        ("a sign “Open”", "open"),
        ('"one" above "two"', "onetwo"),
        ("a cat", ""),
        ('an empty ""', ""),
        ('one mark " only', ""),
    ],
)
def test_what_is_asked_stands_in_double_quotes(prompt, expected):
    assert asked_text(prompt) == expected


def test_scores_pieces_blanks_and_case():
    reward, seen = reading(("New ", "YORK"), None, ("Nev York",))
    images = torch.zeros(3, 3, 8, 8)
    images[:, 0] = 1.0  # red
    scores = reward(images, ['a sign "new york"'] * 3)
    assert scores.tolist() == pytest.approx([1, 0, 6 / 7])
    assert seen[0].shape == (8, 8, 3) and seen[0].dtype == np.uint8
    assert seen[0][0, 0].tolist() == [0, 0, 255]  # OpenCV's order


def test_a_prompt_without_quotes_is_named():
    reward, _ = reading(("a",))
    with pytest.raises(RewardError, match=r"reward 'ocr', image 1 \('a dog'\).*no text in double quotes"):
        score(reward, torch.zeros(2, 3, 8, 8), ['a "cat"', "a dog"], name="ocr")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(module, "import_module", absent)
    with pytest.raises(InputError, match=r"No module named 'rapidocr'.*pip install 'rpo\[ocr\]'"):
        OcrReward()(torch.zeros(1, 3, 8, 8), ['a "cat"'])


def test_the_named_one_has_no_gradient_and_is_not_loaded_yet():
    assert load_reward("ocr") is OCR
    assert not OCR.is_differentiable


def rendered(word, edge, size, ink, paper):
    image = Image.new("RGB", (edge, edge), paper)
    draw = ImageDraw.Draw(image)
    draw.text((edge / 2, edge / 2), word, font=ImageFont.load_default(size), fill=ink, anchor="mm")
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rapidocr") is None, reason="needs the extra rpo[ocr]")
def test_rendered_words_are_read_and_noise_and_blanks_are_not():
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 5))) for _ in range(500)]
    looks = [("black", "white", 16), ("white", "navy", 18), ("darkred", "khaki", 20)]
    images = torch.stack(
        [rendered(word, 96, size, ink, paper) for word, (ink, paper, size) in zip(words, looks * 167, strict=False)]
    )
    prompts = [f'the word "{word}"' for word in words]
    scores = OCR(images, prompts)
    assert (scores == 1).double().mean() >= 0.95
    assert torch.equal(OCR(images[:3], prompts[:3]), scores[:3])
    assert OCR(images[:20], prompts[1:21]).mean() < 0.3
    noise = torch.rand(10, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    flat = torch.stack([torch.full((3, 96, 96), level) for level in (0.0, 0.5, 1.0)])
    assert OCR(torch.cat([noise, flat]), prompts[:13]).tolist() == [0] * 13
