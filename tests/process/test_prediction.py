"""Every view of (x_0, eps) and back is the identity, in float64."""

import math

import pytest
import torch

from rpo.process.prediction import add_noise, from_x0_eps, to_x0_eps
from rpo.types import Node


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vp_node(angle):
    return Node(torch.tensor(math.cos(angle)).double(), torch.tensor(math.sin(angle)).double(), torch.tensor(0))


def flow_node(sigma):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    return Node(1 - sigma, sigma, sigma)


NODES = {
    "epsilon": [vp_node(0.1), vp_node(1.4)],
    "v_prediction": [vp_node(0.1), vp_node(math.pi / 2)],
    "sample": [vp_node(0.1), vp_node(math.pi / 2)],
    "flow": [flow_node(0.05), flow_node(1.0)],
}


@pytest.mark.parametrize("prediction_type", NODES)
def test_round_trip(prediction_type):
    x_0, eps = randn(2, 4, 3, 3, seed=0), randn(2, 4, 3, 3, seed=1)
    for node in NODES[prediction_type]:
        x_t = add_noise(x_0, eps, node)
        x0_hat, eps_hat = to_x0_eps(from_x0_eps(x_0, eps, node, prediction_type), x_t, node, prediction_type)
        assert torch.allclose(x0_hat, x_0, atol=1e-12)
        assert torch.allclose(eps_hat, eps, atol=1e-12)


def test_flow_and_v_prediction_are_different_things():
    x_0, eps, node = randn(1, 1, 2, 2, seed=0), randn(1, 1, 2, 2, seed=1), vp_node(0.7)
    assert not torch.allclose(from_x0_eps(x_0, eps, node, "flow"), from_x0_eps(x_0, eps, node, "v_prediction"))
