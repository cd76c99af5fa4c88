"""OWLv2 with small random weights, of the real classes, against a reading of its logits and boxes by hand."""

import pytest
import torch
from PIL import Image
from transformers import (
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
)

from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.rewards.clip import clip_score
from rpo.rewards.composition import CompositionReward, composition
from rpo.rewards.detector import OpenVocabularyDetector, apart
from rpo.rewards.version import version_of
from tests.rewards.clip_models import save_clip
from tests.tiny import tiny_text_config, tiny_tokenizer

EDGE, TOKENS = 32, 32
NAMES = ["red circle", "dog", "house"]


def save_owl(folder):
    text = tiny_text_config().to_dict() | {"max_position_embeddings": TOKENS}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": EDGE,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)).eval()
        for parameter in model.parameters():  # wide enough that places and names differ
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = TOKENS
    processor = Owlv2ImageProcessorPil(size={"height": EDGE, "width": EDGE})
    Owlv2Processor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_owl(tmp_path_factory.mktemp("owl"))


def pictures(height=24, width=40):
    noise = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    return (noise * 255).round() / 255


@torch.no_grad()
def by_hand(folder, pixels, names, threshold, most):
    model, processor = Owlv2ForObjectDetection.from_pretrained(folder).eval(), Owlv2Processor.from_pretrained(folder)
    inputs = processor(
        text=[[f"a photo of a {name}" for name in names]], images=Image.fromarray(pixels), return_tensors="pt"
    )
    said = model(**inputs)
    chances, side = 1 / (1 + (-said.logits[0].double()).exp()), max(pixels.shape[:2])
    found = {name: [] for name in names}
    places = []
    for place in range(len(chances)):
        best = int(chances[place].argmax())
        x, y, w, h = (side * said.pred_boxes[0, place].double()).tolist()
        if chances[place, best] > threshold:
            places.append((chances[place, best].item(), names[best], (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
    for chance, name, box in sorted(places, reverse=True):
        if all(overlap(box, other) <= most for other, _ in found[name]):
            found[name].append((box, chance))
    return found


def overlap(a, b):
    across, down = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return across * down / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - across * down)


@pytest.mark.parametrize("size", [(24, 40), (48, 32)])
def test_what_is_found_is_what_the_logits_and_boxes_say(folder, size):
    images = pictures(*size)
    detector = OpenVocabularyDetector(str(folder), threshold=0.3, overlap=0.5)
    numbers = []
    for pixels, found in zip(to_pixels(images), detector(images, [NAMES, NAMES]), strict=True):
        expected = by_hand(folder, pixels, NAMES, 0.3, 0.5)
        assert list(found) == NAMES
        for name in NAMES:
            assert len(found[name]) == len(expected[name])
            for thing, (box, chance) in zip(found[name], expected[name], strict=True):
                assert thing.box == pytest.approx(box, abs=1e-3) and thing.confidence == pytest.approx(chance, abs=1e-5)
            numbers.append(len(found[name]))
    assert max(numbers) > 1


def test_nothing_is_found_above_certainty(folder):
    found = OpenVocabularyDetector(str(folder), threshold=1.0)(pictures(), [["dog"], ["house", "dog"]])
    assert found == [{"dog": []}, {"house": [], "dog": []}]


def test_boxes_that_overlap_a_surer_one_are_the_same_thing():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [5, 0, 15, 10], [0, 0, 10, 10.0], [50, 50, 50, 50]])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.5, 0.1])
    assert apart(boxes, scores, overlap=0.5) == [1, 2, 4]
    assert apart(boxes, scores, overlap=0.3) == [1, 4]
    assert apart(boxes[:0], scores[:0], overlap=0.5) == []


def test_a_name_that_is_too_long_is_refused_and_not_cut(folder):
    with pytest.raises(InputError, match="takes 32;"):
        OpenVocabularyDetector(str(folder))(pictures()[:1], [["house " * 20]])


def test_its_version_is_that_of_its_weights(folder, tmp_path):
    version = OpenVocabularyDetector(str(folder)).version()
    copy = save_owl(tmp_path / "owl")
    assert OpenVocabularyDetector(str(copy)).version() == version
    assert OpenVocabularyDetector(str(copy), threshold=0.3).version() != version
    save_clip(tmp_path / "clip")
    reward = CompositionReward(OpenVocabularyDetector(str(copy)), clip_score(str(tmp_path / "clip")))
    before = version_of(reward)
    with torch.no_grad():
        reward.detector._loaded.model.class_head.dense0.weight[0, 0] += 1
    assert version in before and version not in version_of(reward) and reward.clip.version() in before


def test_it_leaves_and_comes_back(folder):
    detector = OpenVocabularyDetector(str(folder), threshold=0.3)
    detector.leave()
    first = detector(pictures(), [NAMES, NAMES])
    detector.leave()
    assert detector(pictures(), [NAMES, NAMES]) == first


def test_a_folder_without_one_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no detector"):
        composition(str(tmp_path)).detector(pictures(), [["a"], ["b"]])
