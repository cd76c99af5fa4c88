"""Grounding DINO with small random weights, of the real classes, against a reading of its logits and boxes by hand."""

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    SwinConfig,
)

from rpo.data.pixels import to_pixels
from rpo.data.prompts import AnnotatedPrompt
from rpo.errors import InputError
from rpo.rewards import load_reward
from rpo.rewards.base import ask
from rpo.rewards.clip import clip_score
from rpo.rewards.composition import CompositionReward
from rpo.rewards.detector import OpenVocabularyDetector
from tests.rewards.clip_models import save_clip
from tests.rewards.test_detector import overlap

NAMES = ["traffic light", "dog", "Red house"]
THRESHOLD = 0.5
PLACES = {1: "traffic", 2: "light", 3: "dog", 4: "red", 5: "house", 0: "[PAD]", 100: "[UNK]", 101: "[CLS]"}
PLACES |= {102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
WORDS = {PLACES.get(number, f"[unused{number}]"): number for number in range(1040)}
"""The model knows BERT's numbers of [CLS], [SEP], . and ? by heart."""


def save_dino(folder):
    width, layers = 16, {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, out_indices=[1, 2]
        ),
        text_config=BertConfig(vocab_size=len(WORDS), hidden_size=width, max_position_embeddings=64, **layers),
        d_model=32,
        num_queries=12,
        num_feature_levels=2,
        max_text_len=24,
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_n_points": 2 for part in ("encoder", "decoder")},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GroundingDinoForObjectDetection(config).eval()
        for parameter in model.parameters():  # wide enough that boxes and words differ
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48})
    GroundingDinoProcessor(processor, BertTokenizer(WORDS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_dino(tmp_path_factory.mktemp("dino"))


def pictures(height=24, width=40):
    noise = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    return (noise * 255).round() / 255


@torch.no_grad()
def by_hand(folder, pixels):
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    processor = GroundingDinoProcessor.from_pretrained(folder)
    inputs = processor(text="traffic light. dog. red house.", images=Image.fromarray(pixels), return_tensors="pt")
    words = processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[0])
    assert words == ["[CLS]", "traffic", "light", ".", "dog", ".", "red", "house", ".", "[SEP]"]
    places, said = [[1, 2], [4], [6, 7]], model(**inputs)
    (height, width), found, kept = pixels.shape[:2], [], {name: [] for name in NAMES}
    for logits, (x, y, w, h) in zip(said.logits[0].double(), said.pred_boxes[0].double().tolist(), strict=True):
        chances = [sum(1 / (1 + (-logits[one]).exp().item()) for one in place) / len(place) for place in places]
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        found += [(max(chances), NAMES[chances.index(max(chances))], box)]
    for chance, name, box in sorted(found, reverse=True):
        if chance > THRESHOLD and all(overlap(box, other) <= 0.5 for other, _ in kept[name]):
            kept[name].append((box, chance))
    return kept


@pytest.mark.parametrize("size", [(24, 40), (48, 32)])
def test_what_is_found_is_what_the_logits_and_boxes_say(folder, size):
    detector, numbers = OpenVocabularyDetector(str(folder), threshold=THRESHOLD), []
    images = pictures(*size)
    for pixels, found in zip(to_pixels(images), detector(images, [NAMES, NAMES]), strict=True):
        expected = by_hand(folder, pixels)
        assert list(found) == NAMES
        for name in NAMES:
            assert len(found[name]) == len(expected[name])
            for thing, (box, chance) in zip(found[name], expected[name], strict=True):
                assert thing.box == pytest.approx(box, abs=1e-3) and thing.confidence == pytest.approx(chance, abs=1e-5)
            numbers.append(len(found[name]))
    assert max(numbers) > 1 and min(numbers) < 3


def test_the_usual_threshold_is_its_own(folder):
    usual, own, other = (OpenVocabularyDetector(str(folder), threshold=one) for one in (None, 0.25, 0.2))
    assert usual(pictures(), [NAMES, NAMES]) == own(pictures(), [NAMES, NAMES])
    assert usual.version() == own.version() != other.version()


def test_names_that_it_would_not_understand_are_refused(folder):
    with pytest.raises(InputError, match="takes 24;"):
        OpenVocabularyDetector(str(folder))(pictures()[:1], [["house " * 30]])
    with pytest.raises(InputError, match=r"'st\. bernard' is asked for"):
        OpenVocabularyDetector(str(folder))(pictures()[:1], [["dog", "st. bernard"]])


def test_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="model_type 'clip'"):
        OpenVocabularyDetector(str(save_clip(tmp_path)))(pictures()[:1], [["dog"]])


def test_it_judges_compositions(folder, tmp_path):
    reward = CompositionReward(
        OpenVocabularyDetector(str(folder), threshold=THRESHOLD), clip_score(str(save_clip(tmp_path)))
    )
    asked = [AnnotatedPrompt("…", {"include": [{"class": name, "count": 1}]}) for name in ("dog", "red house")]
    found = ask(load_reward(reward), pictures(), asked, name="composition")
    things = reward.detector(pictures(), [["dog"], ["red house"]])
    assert found.values.tolist() == [float(bool(things[0]["dog"])), float(bool(things[1]["red house"]))]
    assert repr(load_reward(f"composition:{folder}").function.detector) == f"OpenVocabularyDetector({str(folder)!r})"
