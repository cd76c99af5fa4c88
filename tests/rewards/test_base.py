import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from rpo.rewards.base import MAX_IMAGES, RewardError, WeightedRewards, ask, check_finite, score

PROMPTS = ["a red circle", "a blue square", "two red circles", "a green triangle"]


def batch(count=4):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def light(images, prompts):
    return images.mean((1, 2, 3))


def answering(answer):
    return lambda images, prompts: answer


@pytest.mark.parametrize(
    "answer",
    [
        torch.tensor([1, 2, 3, 4], dtype=torch.float64),
        torch.tensor([1, 2, 3, 4], dtype=torch.bfloat16),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([1.0, 2, 3, 4], requires_grad=True),
        np.array([4.0, 3, 2, 1])[::-1],
        np.array([1, 2, 3, 4], np.float16),
        [1.0, 2.0, 3.0, 4.0],
        (1, 2, 3, 4),
        [torch.tensor(1.0), np.float32(2), np.array(3.0), 4],
    ],
    ids=["float64", "bfloat16", "integers", "with gradient", "reversed array", "half array", "list", "tuple", "mixed"],
)
def test_every_kind_of_answer_becomes_float32(answer):
    scores = score(answering(answer), batch(), PROMPTS, name="r")
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.tolist() == [1, 2, 3, 4]


def test_booleans_count_as_zero_and_one():
    assert score(answering([True, False, np.True_, 0.5]), batch(), PROMPTS, name="r").tolist() == [1, 0, 1, 0.5]
    assert score(answering(torch.tensor([True, False])), batch(2), PROMPTS[:2], name="r").tolist() == [1, 0]


@pytest.mark.gpu
def test_scores_come_back_to_the_device_of_the_images():
    images = batch().cuda()
    assert score(answering([1, 2, 3, 4]), images, PROMPTS, name="r").device == images.device
    assert score(lambda images, _: images.mean((1, 2, 3)).cuda(), batch(), PROMPTS, name="r").device.type == "cpu"


def test_a_reward_cannot_change_what_the_next_one_sees():
    def spoiling(images, prompts):
        images.mul_(0)
        prompts.clear()
        return torch.zeros(4)

    images, prompts = batch(), list(PROMPTS)
    before = images.clone()
    score(spoiling, images, prompts, name="r")
    assert torch.equal(images, before) and prompts == PROMPTS


def test_no_graph_is_built():
    weight = torch.ones((), requires_grad=True)

    def learnt(images, prompts):
        assert not torch.is_grad_enabled()
        return weight * images.mean((1, 2, 3))

    assert not score(learnt, batch().requires_grad_(), PROMPTS, name="r").requires_grad


NAN, INF = float("nan"), float("inf")
BAD_ANSWERS = {
    "nan": (torch.tensor([1, NAN, 3, NAN]), [1, 3], "returned nan; expected a finite float32 number; "),
    "inf": ([1.0, 2.0, -INF, 4.0], [2], "returned -inf; expected a finite float32 number; "),
    "beyond float32": ([1.0, 1e300, 0.0, 0.0], [1], "returned 1e+300; expected a finite float32 number; "),
    "too few": ([1.0, 2.0, 3.0], [0, 1, 2, 3], "returned 3 numbers for 4 images; expected shape [4], "),
    "a column": (
        torch.zeros(4, 1),
        [0, 1, 2, 3],
        "returned numbers of shape [4, 1] for 4 images; expected shape [4], ",
    ),
    "one for all": (torch.tensor(1.0), [0, 1, 2, 3], "returned numbers of shape [] for 4 images; "),
    "a number": (1.0, [0, 1, 2, 3], "returned a float; expected one real number per image; "),
    "none": (None, [0, 1, 2, 3], "returned a NoneType; expected one real number per image; "),
    "complex": (
        torch.zeros(4, dtype=torch.cfloat),
        [0, 1, 2, 3],
        "returned a Tensor of torch.complex64; expected one ",
    ),
    "text": (["1", "2", "3", "4"], [0, 1, 2, 3], "returned a list with a str at position 0; expected numbers only"),
    "texts": (np.array(["1"] * 4), [0, 1, 2, 3], "returned a ndarray of <U1; expected one real number per image; "),
    "a pair": (
        (torch.zeros(4), [0, 0, 0, 0]),
        [0, 1, 2, 3],
        "returned a list with a Tensor at position 0; expected numbers ",
    ),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_bad_answer_names_reward_image_and_prompt_and_saves_them(case, tmp_path):
    answer, indices, problem = BAD_ANSWERS[case]
    with pytest.raises(RewardError) as caught:
        score(answering(answer), batch(), PROMPTS, name="my reward", evidence=tmp_path / "evidence")
    more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
    begins = f"reward 'my reward', image {indices[0]} ({PROMPTS[indices[0]]!r}){more}: {problem}"
    assert str(caught.value).startswith(begins)
    folder = tmp_path / "evidence" / "my_reward-1"
    assert str(caught.value).endswith(f". Images and prompts are in {folder}")
    assert caught.value.indices == tuple(indices) and caught.value.saved_in == folder
    assert sorted(file.name for file in folder.iterdir()) == ["fault.json", *(f"image_{i:03d}.png" for i in indices)]
    record = json.loads((folder / "fault.json").read_text())
    assert record["reward"] == "my reward" and record["problem"].startswith(problem)
    assert [(one["index"], one["prompt"]) for one in record["images"]] == [(i, PROMPTS[i]) for i in indices]
    for one in record["images"]:
        saved = np.asarray(Image.open(folder / one["file"]))
        assert np.array_equal(saved, (batch()[one["index"]] * 255).round().byte().permute(1, 2, 0).numpy())


def test_without_a_folder_nothing_is_saved():
    with pytest.raises(RewardError) as caught:
        score(answering([NAN] * 4), batch(), PROMPTS, name="r")
    assert str(caught.value) == (
        "reward 'r', image 0 ('a red circle') and 3 more: returned nan; expected a finite float32 number; make the "
        "reward finite on every image, then resume"
    )
    assert caught.value.saved_in is None


def test_an_exception_is_chained_and_the_reward_asked_once(tmp_path):
    calls = []

    def failing(images, prompts):
        calls.append(len(images))
        raise KeyError("weights")

    with pytest.raises(RewardError) as caught:
        score(failing, batch(), PROMPTS, name="r", evidence=tmp_path)
    assert str(caught.value) == (
        "reward 'r', image 0 ('a red circle') and 3 more: raised KeyError: 'weights'; expected one number per image; "
        f"call the reward on these images to find the fault, then resume. Images and prompts are in {tmp_path / 'r-1'}"
    )
    assert isinstance(caught.value.__cause__, KeyError)
    assert calls == [4]


def test_only_the_first_images_of_many_are_kept(tmp_path):
    prompts = [f"prompt {index}" for index in range(20)]
    with pytest.raises(RewardError) as caught:
        score(answering([0.0] * 3 + [NAN] * 17), batch(20), prompts, name="r", evidence=tmp_path)
    assert caught.value.indices == tuple(range(3, 20))
    record = json.loads((tmp_path / "r-1" / "fault.json").read_text())
    assert record["images_at_fault"] == 17
    assert [one["prompt"] for one in record["images"]] == prompts[3 : 3 + MAX_IMAGES]
    assert len(list((tmp_path / "r-1").glob("*.png"))) == MAX_IMAGES


def test_a_second_fault_keeps_the_first(tmp_path):
    for _ in range(2):
        with pytest.raises(RewardError):
            score(answering([NAN] * 4), batch(), PROMPTS, name="pkg.mod:Name", evidence=tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["pkg.mod_Name-1", "pkg.mod_Name-2"]


def test_a_name_cannot_leave_the_folder(tmp_path):
    with pytest.raises(RewardError) as caught:
        score(answering([NAN] * 4), batch(), PROMPTS, name="../..", evidence=tmp_path / "evidence")
    assert caught.value.saved_in.parent == tmp_path / "evidence"
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]


def test_evidence_that_cannot_be_saved_does_not_hide_the_fault(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(RewardError, match="returned nan; .* could not be saved: ") as caught:
        score(answering([NAN] * 4), batch(), PROMPTS, name="r", evidence=tmp_path / "taken")
    assert caught.value.saved_in is None


@pytest.mark.parametrize(
    ("spoil", "values"),
    [
        (lambda image: image * 0 + 255, "from 255 to 255"),
        (lambda image: image * 0 - 1, "from -1 to -1"),
        (lambda image: image * NAN, "from nan to nan"),
        (lambda image: image * 0 + 1.0000001, "from 1.00000012 to 1.00000012"),
    ],
)
def test_images_out_of_range_never_reach_the_reward(spoil, values, tmp_path):
    images = batch()
    images[2] = spoil(images[2])
    with pytest.raises(RewardError) as caught:
        score(lambda *_: pytest.fail("was asked"), images, PROMPTS, name="r", evidence=tmp_path)
    assert str(caught.value).startswith(
        f"reward 'r', image 2 ('two red circles'): got values {values}; expected [0, 1]; divide bytes by 255, "
    )
    assert (tmp_path / "r-1" / "image_002.png").is_file()


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (
            batch()[:, :1],
            PROMPTS,
            "got images of torch.float32 [4, 1, 8, 8]; expected float [batch, 3, height, width] ",
        ),
        (batch()[0], PROMPTS, "got images of torch.float32 [3, 8, 8]; expected float "),
        (batch()[:0], [], "got images of torch.float32 [0, 3, 8, 8]; expected float "),
        ((batch() * 255).byte(), PROMPTS, "got images of torch.uint8 [4, 3, 8, 8]; expected float "),
        (batch(), PROMPTS[:3], "got 3 prompts for 4 images; expected one per image; "),
        (batch(), "cats", "got the prompts 'cats'; expected a list of strings; "),
        (batch(), [1, 2, 3, 4], "got the prompts [1, 2, 3, 4]; expected a list of strings; "),
    ],
)
def test_an_unsound_batch_never_reaches_the_reward(images, prompts, message):
    with pytest.raises(RewardError, match=f"^reward 'r': {re.escape(message)}"):
        score(lambda *_: pytest.fail("was asked"), images, prompts, name="r")


def test_a_reward_that_knows_the_image_at_fault_is_believed():
    def knowing(images, prompts):
        raise RewardError("cannot read it", indices=[3], batch_size=len(images))

    with pytest.raises(RewardError, match=r"^reward 'r', image 3 \('a green triangle'\): cannot read it$"):
        score(knowing, batch(), PROMPTS, name="r")


def test_indices_among_other_images_are_not_believed():
    def in_halves(images, prompts):
        for half in images.split(2):
            check_finite(half.mean((1, 2, 3)) * NAN)

    with pytest.raises(RewardError, match=r"^reward 'r', image 0 \('a red circle'\) and 3 more: returned nan"):
        score(in_halves, batch(), PROMPTS, name="r")


def test_a_score_may_fail_where_who_asks_can_do_without_it(tmp_path):
    info = {"size": [1.0, 2.0, 3.0, NAN]}
    found = ask(answering(([1.0, NAN, 2.0, 3.0], info)), batch(), PROMPTS, name="r", evidence=tmp_path, may_fail=True)
    assert found.values.isnan().tolist() == [False, True, False, False] and not list(tmp_path.iterdir())
    assert math.isnan(found.info["size"])
    info["size"][3] = 5.0
    found = ask(answering(([1.0, NAN, 2.0, 3.0], info)), batch(), PROMPTS, name="r", may_fail=True)
    assert found.info == {"size": 3.0}  # of the judged images
    for wrong in ([1.0, NAN, INF, 3.0], [1.0, NAN, 1e300, 3.0]):
        with pytest.raises(RewardError, match=r"^reward 'r', image 2 \('two red circles'\): returned (inf|1e\+300);"):
            ask(answering(wrong), batch(), PROMPTS, name="r", may_fail=True)
    both = WeightedRewards({"light": (light, 1.0), "r": (answering([NAN] * 4), 1.0)})
    assert both.ask(batch(), PROMPTS, may_fail=True)["r"].values.isnan().all()


def test_weighted_rewards():
    both = WeightedRewards({"light": (light, 2.0), "length": (lambda _, prompts: [len(p) for p in prompts], -0.5)})
    images = batch()
    parts = both.parts(images, PROMPTS)
    assert dict(both.weights) == {"light": 2.0, "length": -0.5} and list(parts) == ["light", "length"]
    assert torch.equal(parts["light"], images.mean((1, 2, 3)))
    assert parts["length"].tolist() == [12, 13, 15, 16]
    expected = 2 * parts["light"] - 0.5 * parts["length"]
    assert torch.equal(both(images, PROMPTS), expected)
    assert torch.equal(score(both, images, PROMPTS, name="sum"), expected)


def test_what_is_followed_is_the_weighted_sum_too():
    both = WeightedRewards({"light": (light, 2.0), "square": (lambda images, _: (images**2).mean((1, 2, 3)), -0.5)})
    images = batch().requires_grad_()
    found = both.with_gradient(images, PROMPTS)
    assert torch.equal(found, both(images, PROMPTS))
    (slope,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(slope, (2 - images.detach()) / images[0].numel())


HALF = [True, False, True, False]


@pytest.mark.parametrize("answer", [[1, 0.0, 1.0, 0], HALF, torch.tensor(HALF), np.array(HALF)])
def test_what_is_followed_may_have_parts_without_a_gradient(answer):
    both = WeightedRewards({"light": (light, 2.0), "plain": (answering(answer), 0.5)})
    images = batch().requires_grad_()
    found = both.with_gradient(images, PROMPTS)
    torch.testing.assert_close(found, 2 * light(images, PROMPTS) + torch.tensor([0.5, 0.0, 0.5, 0.0]))
    (slope,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(slope, torch.full_like(images, 2 / images[0].numel()))


def test_weighted_rewards_name_the_one_that_failed(tmp_path):
    both = WeightedRewards({"light": (light, 1.0), "broken": (answering([0.0, NAN, 0.0, 0.0]), 1.0)})
    with pytest.raises(RewardError, match=r"^reward 'broken', image 1 \('a blue square'\): returned nan"):
        both.parts(batch(), PROMPTS, evidence=tmp_path)
    assert (tmp_path / "broken-1" / "image_001.png").is_file()
    with pytest.raises(RewardError, match=r"^reward 'sum', image 1 \(.*\): reward 'broken', image 1 \(.*\): returned"):
        score(both, batch(), PROMPTS, name="sum")


@pytest.mark.parametrize("weight", [0, 0.0, NAN, INF])
def test_weights_must_count(weight):
    with pytest.raises(ValueError, match=f"^the weight of reward 'light' is {weight:g}; expected a finite number "):
        WeightedRewards({"light": (light, weight)})


def test_at_least_one_reward():
    with pytest.raises(ValueError, match="^got no reward; expected at least one; "):
        WeightedRewards({})
