"""Settings that no online run can have are refused by name, with what to do."""

import pytest

from rpo.config.load import load_config
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.reward_gradient_config import RewardGradientConfig
from rpo.trainers.score_as_action_config import ScoreAsActionConfig

REFUSED = [
    (ScoreAsActionConfig, ["kl_weight=-1"], "sets 'kl_weight' to -1, but a number"),
    (ScoreAsActionConfig, ["rollout.eta=0"], "no transition density"),
    (ScoreAsActionConfig, ["steps.guidance_scale=1"], "the likelihood of what was drawn"),
    (ScoreAsActionConfig, ["update=trust_region"], "before which the policy has not moved"),
    (ScoreAsActionConfig, ["estimator=pathwise", "value.uses_reward=false"], "V would not depend on the latents"),
    (ScoreAsActionConfig, ["estimator=pathwise", "update=clip"], "which has no ratio to clip"),
    (
        ScoreAsActionConfig,
        ["estimator=pathwise", "steps.guidance_scale=1", "kl_weight=0.1"],
        "are those of the guidance it was drawn with",
    ),
    (
        ScoreAsActionConfig,
        ["estimator=pathwise", "steps.guidance_scale=1", "steps.keep_graph=true"],
        "are those of the guidance it was drawn with",
    ),
    (ScoreAsActionConfig, ["advantage=group", "rollout.images_per_prompt=1"], "a group is the images of one prompt"),
    (
        ScoreAsActionConfig,
        ["estimator=pathwise", "rollout.guidance_scale=1", "steps.guidance_scale=3"],
        "negative branch from the rollout, which has none",
    ),
    (GRPOConfig, ["regression=1", "baseline=prompt_history"], "it compares the images of a group"),
    (GRPOConfig, ["regression=1", "steps.keep_graph=true"], "reads their steps anew"),
    (EndpointConfig, ["value.trace=0.5"], "value.trace is 0.5"),
    (EndpointConfig, ["steps.keep_graph=true"], "no graph of a rollout"),
    (EndpointConfig, ["rollout.images_per_prompt=1"], "a group is the images of one prompt"),
    (EndpointConfig, ["objective.consistency=-1"], "consistency' to -1, but"),
    (EndpointConfig, ["objective.clip=0"], "clip' to 0, but a number"),
    (RewardGradientConfig, ["steps.keep_graph=true"], "need no graph of a rollout"),
    (RewardGradientConfig, ["steps.passes=2"], "the policy that drew it"),
    (RewardGradientConfig, ["objective.last_steps=11"], "objective.last_steps is 11, but a path has 10 steps"),
    (RewardGradientConfig, ["steps.guidance_scale=1"], "the slope is that of what was drawn"),
    (RewardGradientConfig, ["steps.window=[0,0.5]"], "the objective says which steps count"),
    (
        RewardGradientConfig,
        ["rollout.solver=dpm_solver", "rollout.eta=0"],
        "follows the steps that were drawn, one leading to the next",
    ),
    (RewardGradientConfig, ["objective.kind=adjoint_matching"], "kl_weight is 0"),
    (
        RewardGradientConfig,
        ["objective.kind=adjoint_matching", "kl_weight=0.1", "rollout.eta=0.5"],
        "at which a path forgets its start",
    ),
    (
        RewardGradientConfig,
        ["objective.kind=adjoint_matching", "kl_weight=0.1", "rollout.eta=0"],
        "eta 0 and objective.last_steps",
    ),
    (RewardGradientConfig, ["objective.kind=srpo", "kl_weight=0.1"], "at moments that lie on none"),
    (RewardGradientConfig, ["objective.kind=srpo", "objective.step=0.5"], "step' to 0.5, but a number"),
    (GRPOConfig, ["rollout.eta=0"], "this algorithm needs likelihoods"),
    (GRPOConfig, ["steps.guidance_scale=1"], "leave it out"),
    (GRPOConfig, ["rollout.images_per_prompt=1"], "a group is the images of one prompt"),
    (GRPOConfig, ["clip=0"], "sets 'clip' to 0, but a number"),
    (GRPOConfig, ["rollout.prompts=0"], "sets 'rollout.prompts' to 0, but a whole number"),
    (GRPOConfig, ["rollout.eta=1.5"], "adds at most the noise of eta 1"),
    (GRPOConfig, ["rollout.guidance_scale=0.5"], "sets 'rollout.guidance_scale' to 0.5, but a number"),
    (GRPOConfig, ["rollout.max_steps=20"], 'with spacing "uniform" or "random"'),
    (GRPOConfig, ["rollout.solver=dpm_solver"], 'set eta: 0 and spacing: "checkpoint"'),
    (GRPOConfig, ["steps.train_steps=0"], "sets 'steps.train_steps' to 0, but"),
    (GRPOConfig, ["steps.keep_graph=true", "steps.passes=2"], "it serves one update"),
    (GRPOConfig, ["steps.window=[0.5,0.2]"], "must rise within 0 … 1"),
    (GRPOConfig, ["learning.micro_batch=0"], "sets 'learning.micro_batch' to 0, but"),
]


@pytest.mark.parametrize(("kind", "words", "message"), REFUSED, ids=[" ".join(words) for _, words, _ in REFUSED])
def test_refusals(kind, words, message):
    with pytest.raises(ValueError, match=".") as caught:
        load_config(kind, None, words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ScoreAsActionConfig, []),
        (
            ScoreAsActionConfig,
            ["estimator=pathwise", "value.uses_reward=false", "value.sees_latents=true", "rollout.eta=0"],
        ),
        (ScoreAsActionConfig, ["estimator=pathwise", "steps.guidance_scale=1"]),
        (ScoreAsActionConfig, ["update=trust_region", "steps.minibatches=4"]),
        (EndpointConfig, ["rollout.solver=dpm_solver", "rollout.eta=0", "steps.guidance_scale=1"]),
        (EndpointConfig, ["steps.minibatches=4", "steps.passes=2"]),
        (EndpointConfig, ["objective.baseline=value", "rollout.images_per_prompt=1"]),
        (RewardGradientConfig, ["rollout.images_per_prompt=1", "objective.last_steps=10"]),
        (RewardGradientConfig, ["objective.kind=adjoint_matching", "kl_weight=0.1", "steps.guidance_scale=1"]),
        (
            RewardGradientConfig,
            ["objective={kind: adjoint_matching, last_steps: 4}", "kl_weight=0.1", "rollout.eta=0"],
        ),
        (RewardGradientConfig, ["objective.kind=refl", "rollout.solver=dpm_solver", "rollout.eta=0"]),
        (GRPOConfig, ["baseline=prompt_history", "rollout.images_per_prompt=1"]),
        (GRPOConfig, ["regression=1", "steps.passes=4"]),
    ],
)
def test_what_goes_together_is_taken(kind, words):
    load_config(kind, None, words)
