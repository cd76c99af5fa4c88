"""Every published endpoint objective trains every family: three updates, of the adapter alone."""

import itertools

import pytest
import torch

from rpo.adapters.lora import lora_parameters
from tests.contracts.families import ALWAYS, FAMILIES
from tests.trainers.online_runs import endpoint, learning, lightness
from tests.trainers.test_presets import PRESETS

pytestmark = [
    pytest.mark.contracts,
    pytest.mark.filterwarnings("ignore:the network denoises no better"),
]


def pairs():
    """All; by default one in each of the families that stand for all."""
    shown = dict(zip(("nft", "rebel", "dgpo", "par"), ALWAYS, strict=True))
    for kind, family in itertools.product(PRESETS, FAMILIES):
        yield pytest.param(kind, family, marks=() if shown.get(kind) == family else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "family"), pairs())
def test_three_updates_move_the_adapter_and_nothing_else(kind, family, tmp_path):
    few = learning(3, learning_rate=1e-2)
    trainer = endpoint(tmp_path, pipe=FAMILIES[family](), objective=PRESETS[kind], reward=lightness, learning=few)
    network = trainer.run.model.denoiser
    own = {id(one) for one in lora_parameters(network)}
    before = {name: one.detach().clone() for name, one in network.named_parameters()}
    assert trainer.train().updates == 3
    assert all(one.isfinite().all() for one in network.parameters())
    changed = {name for name, one in network.named_parameters() if not torch.equal(one, before[name])}
    named = {name for name, one in network.named_parameters() if id(one) in own}
    assert changed <= named
    ups = {name for name in named if ".lora_B." in name}
    # All but the last text projections of SD 3, whose output no image sees.
    assert {name.rpartition(".attn.")[2].partition(".")[0] for name in ups - changed} <= {"add_q_proj"}
