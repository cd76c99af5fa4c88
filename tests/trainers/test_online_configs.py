"""Settings that no online run can have are refused by name, with what to do."""

import pytest

from rpo.config import load_config
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.score_as_action_config import ScoreAsActionConfig

REFUSED = [
    (ScoreAsActionConfig, ["kl_weight=-1"], "sets 'kl_weight' to -1, but a number"),
    (ScoreAsActionConfig, ["rollout.eta=0"], "whose steps have no transition density; set eta above 0"),
    (ScoreAsActionConfig, ["learning.guidance_scale=1"], "the rollout's is 3.0: the likelihood of what was drawn"),
    (ScoreAsActionConfig, ["update=trust_region"], "before which the policy has not moved"),
    (ScoreAsActionConfig, ["estimator=pathwise"], "a frozen reward branch, so the slope of V would lack"),
    (ScoreAsActionConfig, ["estimator=pathwise", "value.design=none"], "V would not depend on the latents"),
    (ScoreAsActionConfig, ["estimator=pathwise", "update=clip"], "which has no ratio to clip"),
    (
        ScoreAsActionConfig,
        ["estimator=pathwise", "value.branch=differentiable", "learning.guidance_scale=1", "kl_weight=0.1"],
        "are those of the guidance it was drawn with",
    ),
    (
        ScoreAsActionConfig,
        ["estimator=pathwise", "value.branch=differentiable", "learning.guidance_scale=1", "learning.keep_graph=true"],
        "are those of the guidance it was drawn with",
    ),
    (ScoreAsActionConfig, ["estimator=endpoint"], "nothing is known of the next moment"),
    (ScoreAsActionConfig, ["estimator=endpoint", "advantage=group", "learning.passes=2"], "no graph of a rollout"),
    (ScoreAsActionConfig, ["estimator=endpoint", "advantage=group", "consistency=-1"], "sets 'consistency' to -1, but"),
    (
        ScoreAsActionConfig,
        ["estimator=endpoint", "advantage=group", "bound_clip=0"],
        "sets 'bound_clip' to 0, but a number",
    ),
    (GRPOConfig, ["rollout.eta=0"], "GRPO needs likelihoods"),
    (GRPOConfig, ["learning.guidance_scale=1"], "leave it out"),
    (GRPOConfig, ["rollout.images_per_prompt=1"], "a group is the images of one prompt"),
    (GRPOConfig, ["clip=0"], "sets 'clip' to 0, but a number"),
    (GRPOConfig, ["min_history=40"], "2 <= min_history <= history"),
    (GRPOConfig, ["rollout.prompts=0"], "sets 'rollout.prompts' to 0, but a whole number"),
    (GRPOConfig, ["rollout.eta=1.5"], "adds at most the noise of eta 1"),
    (GRPOConfig, ["rollout.guidance_scale=0.5"], "sets 'rollout.guidance_scale' to 0.5, but a number"),
    (GRPOConfig, ["rollout.max_steps=20"], 'with spacing "uniform" or "random"'),
    (GRPOConfig, ["rollout.solver=dpm_solver"], 'set eta: 0 and spacing: "checkpoint"'),
    (GRPOConfig, ["learning.train_steps=0"], "sets 'learning.train_steps' to 0, but"),
    (GRPOConfig, ["learning.keep_graph=true", "learning.passes=2"], "it serves one update"),
    (GRPOConfig, ["learning.window=[0.5,0.2]"], "must rise within 0 … 1"),
    (GRPOConfig, ["learning.micro_batch=0"], "sets 'learning.micro_batch' to 0, but"),
]


@pytest.mark.parametrize(("kind", "words", "message"), REFUSED, ids=[" ".join(words) for _, words, _ in REFUSED])
def test_refusals(kind, words, message):
    with pytest.raises(ValueError, match=".") as caught:
        load_config(kind, None, words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["estimator=pathwise", "value.design=none", "value.inputs=both", "rollout.eta=0"],
        ["estimator=pathwise", "value.branch=differentiable", "learning.guidance_scale=1"],
        ["estimator=endpoint", "advantage=group", "rollout.solver=dpm_solver", "rollout.eta=0"],
        ["update=trust_region", "learning.minibatches=4"],
    ],
)
def test_what_goes_together_is_taken(words):
    config = load_config(ScoreAsActionConfig, None, words)
    assert config.online_settings().has_ratio == (config.estimator != "endpoint" and config.rollout.has_density)
