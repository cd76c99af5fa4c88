"""Several rewards under one name."""

import pytest
import torch

from rpo.errors import InputError
from rpo.rewards import load_reward, load_rewards
from rpo.rewards.mixture import weights_of
from rpo.rewards.version import version_of

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TEXTS = ["a red circle", "a blue square", "a red circle above a blue square"]


def test_it_is_the_weighted_sum():
    both = load_reward("mixture:shapes-critic=2,jpeg-compressibility=-0.5")
    critic, size = (load_reward(name)(IMAGES, TEXTS) for name in ("shapes-critic", "jpeg-compressibility"))
    assert torch.allclose(both(IMAGES, TEXTS), 2 * critic - 0.5 * size)
    assert load_rewards({"mixture:shapes=1": 3.0})(IMAGES, TEXTS).equal(3 * load_reward("shapes")(IMAGES, TEXTS))


def test_its_version_has_those_of_its_parts_and_their_weights():
    one, other = (version_of(load_reward(f"mixture:shapes=1,shapes-clip={weight}")) for weight in (0.1, 0.2))
    assert one != other and version_of(load_reward("shapes-clip")) in one


def test_names_may_have_a_checkpoint_or_an_address():
    text = "clip-score:owner/name=1,http://host:1/ocr?seconds=3=0.5"
    assert weights_of(text) == {"clip-score:owner/name": 1.0, "http://host:1/ocr?seconds=3": 0.5}


@pytest.mark.parametrize("parts", ["", "shapes", "shapes=", "=1", "a=x", "shapes=1,", "shapes=1,shapes=2", "a=inf"])
def test_what_is_no_mixture_is_refused(parts):
    with pytest.raises(InputError, match="NAME=WEIGHT"):
        load_reward(f"mixture:{parts}")


def test_an_unknown_part_is_told():
    with pytest.raises(InputError, match="nearest is 'shapes-clip'"):
        load_reward("mixture:shapes=1,shapes-clap=1")
