import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil

from rpo.errors import InputError
from rpo.rewards import RewardError, load_reward, load_rewards
from rpo.rewards.aesthetic import AESTHETIC, AestheticReward
from rpo.rewards.clip import CLIP_SCORE, ClipReward
from rpo.rewards.weights import LinearHead
from tests.rewards.clip_models import DIM, EDGE, OLD_PREPROCESSOR, save_clip, tiny_clip

PROMPTS = ["a red fox", "", "an oak"]


def tiny_head(width=DIM):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LinearHead(width).state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_clip(tmp_path_factory.mktemp("aesthetic"))
    torch.save(tiny_head(), folder / "aesthetic-model.pth")
    return folder


def pictures(count=3, height=EDGE, width=EDGE):
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    return (noise * 255).round() / 255


def by_hand(images):
    """The published predictor's steps on transformers' own processor and model."""
    as_bytes = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = CLIPImageProcessorPil.from_dict(dict(OLD_PREPROCESSOR))(list(as_bytes), return_tensors="pt").pixel_values
    with torch.no_grad():
        features = tiny_clip().get_image_features(pixel_values=pixels).pooler_output
    x = features / features.norm(dim=-1, keepdim=True)
    state = tiny_head()
    for number in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    return x[:, 0]


def test_it_is_the_head_on_the_unit_embedding(folder):
    scores = load_reward(f"aesthetic:{folder}")(pictures(), PROMPTS)
    assert scores.std() > 1e-3
    torch.testing.assert_close(scores, by_hand(pictures()), rtol=1e-4, atol=1e-5)


def test_neither_prompt_nor_neighbours_matter(folder):
    images = pictures(5, 40, 50)
    clip = ClipReward(folder, batch_size=2)
    alone = torch.cat([load_reward(f"aesthetic:{folder}")(images[k : k + 1], [""]) for k in range(5)])
    torch.testing.assert_close(AestheticReward(clip, folder)(images, list("abcde")), alone, rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_every_image_and_is_finite(folder):
    images = torch.cat([pictures(2), torch.full((1, 3, EDGE, EDGE), 0.5)]).requires_grad_()
    load_rewards({f"aesthetic:{folder}": 1.0}).with_gradient(images, PROMPTS).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_the_head_may_be_a_safetensors_file_and_autocast_changes_nothing(folder, tmp_path):
    save_file(tiny_head(), tmp_path / "aesthetic-model.safetensors")
    other = AestheticReward(ClipReward(folder), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        scores = other(pictures(), PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, load_reward(f"aesthetic:{folder}")(pictures(), PROMPTS))


def test_the_named_one_shares_its_clip_with_clip_score():
    assert load_reward("aesthetic") is AESTHETIC
    assert AESTHETIC.clip is CLIP_SCORE
    assert repr(AESTHETIC).endswith(", 'trl-lib/ddpo-aesthetic-predictor')")


def test_wrong_heads_and_images_are_refused(folder, tmp_path):
    clip = ClipReward(folder)
    with pytest.raises(InputError, match=r"has no aesthetic-model\.pth or aesthetic-model\.safetensors"):
        AestheticReward(clip, tmp_path)(pictures(1), [""])
    torch.save(tiny_head(DIM + 1), tmp_path / "aesthetic-model.pth")
    with pytest.raises(InputError, match=rf"aesthetic-model\.pth has layers\.0\.weight of shape .*embeddings of {DIM}"):
        AestheticReward(clip, tmp_path)(pictures(1), [""])
    with pytest.raises(RewardError, match="expected \\[0, 1\\]"):
        AestheticReward(clip, folder)(2 * pictures(1), [""])
