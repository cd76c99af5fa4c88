"""What waits for a device: nothing inside a rollout or an update, and outside of them what is listed here."""

import traceback
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rpo.models.checkpoint import Checkpoint
from rpo.objectives.endpoint.nft import Nft
from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.kto import Kto
from rpo.process.diffusion import diffusion_of
from rpo.sampling.sample import Keep, image_generator, sample
from rpo.training.gradients import FlatGradients
from rpo.training.loop_config import LoopConfig
from rpo.training.processes import Processes
from rpo.training.step import Accumulator
from tests.contracts.families import FAMILIES
from tests.marks import slow_but
from tests.tiny_amused import tiny_amused
from tests.trainers.online_runs import UNWATCHED, endpoint, grpo, learning, lightness
from tests.trainers.pair_runs import trainer_of
from tests.without_numbers import META, denoiser_there, innermost, reads, there, uploads

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")

LISTS = ("lumina2", "z_image")
"""Families whose networks make lists of the captions' lengths, which the host must know."""

STEPS = 2

NOISE = {"devices.py uploaded": 1}

OF_THE_LIBRARY = {
    "chroma": {"models/families/chroma.py forward": 2 * STEPS},  # in every call, two in a guided step
    "qwen_image": {"models/families/qwen_image.py forward": 2 * STEPS + 2},  # and two tables in the first
}
"""What networks of diffusers make on the host."""

WAITLESS = [name for name in {**FAMILIES, "masked_tokens": tiny_amused} if name not in LISTS]
QUICK = ("sdxl", "sd3", "masked_tokens")


def drawn(family):
    """What a rollout of a family uploads."""
    model = Checkpoint({**FAMILIES, "masked_tokens": tiny_amused}[family]())
    cond, grid = there(model.encode_prompts(["a house"])), there(model.grid(STEPS))
    model.denoiser.to(META)
    kernel, keep = diffusion_of(model.prediction_type).kernel("ddim", 1.0), Keep(predictions=True, negatives=True)
    with uploads() as found:
        generators = [image_generator(0, 0, 0)]
        drawn = sample(model, cond, grid, kernel, guidance_scale=3.0, generators=generators, keep=keep)
    assert drawn.latents.device == META
    return found


@pytest.mark.parametrize("family", slow_but(QUICK, WAITLESS))
def test_a_rollout_reads_nothing_and_uploads_nothing_but_its_noise(family):
    assert drawn(family) == {**NOISE, **OF_THE_LIBRARY.get(family, {})}


@pytest.mark.parametrize("family", LISTS)
def test_two_families_wait_for_lengths_in_every_step(family):
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        drawn(family)


UPDATES = {
    "dpo": lambda folder: trainer_of(folder),
    "dpo, sdxl": lambda folder: trainer_of(folder, pipe=FAMILIES["sdxl"]()),
    "dpo, sd3": lambda folder: trainer_of(folder, pipe=FAMILIES["sd3"]()),
    "dpo by time": lambda folder: trainer_of(folder, objective=Dpo(normalization="time", margin=0.5)),
    "dpo by weights": lambda folder: trainer_of(
        folder, objective=Dpo(normalization="weights", time_weights=(1.0, 2.0, 0.0), winner_preserving=0.9)
    ),
    "kto": lambda folder: trainer_of(folder, objective=Kto()),
    "grpo": lambda folder: grpo(folder, monitor=UNWATCHED, kl_weight=0.1),
    "endpoint": lambda folder: endpoint(folder, monitor=UNWATCHED),
    "nft": lambda folder: endpoint(folder, monitor=UNWATCHED, objective=Nft()),
}
ONLINE = ("grpo", "endpoint", "nft")


@pytest.mark.parametrize("name", slow_but(("dpo, sd3", "grpo", "nft"), UPDATES))
def test_an_update_reads_once_and_uploads_nothing(name, tmp_path):
    trainer = UPDATES[name](tmp_path)
    algorithm = trainer.algorithm
    algorithm.prepare()
    batch = there(next(algorithm.batches(0)))
    if getattr(algorithm, "statistics", None) is not None:
        algorithm.statistics = there_too(algorithm.statistics)
    gradients = FlatGradients(denoiser_there(trainer.run.model))
    if name not in ONLINE:
        trainer.run.model.node(batch.timestep)  # brings its table there
    accumulator = Accumulator(
        algorithm.loss, algorithm.names, gradients=gradients, processes=Processes(), loop=LoopConfig()
    )
    with uploads() as uploaded, reads() as read:
        accumulator.run(iter([batch]), update=1, scale=1.0, scale_may_shrink=False)
    assert read == {"training/step.py run": 1}
    assert not uploaded


def there_too(statistics):
    """Running statistics, whose tensors are attributes."""
    for name, one in vars(statistics).items():
        if isinstance(one, torch.Tensor):
            setattr(statistics, name, one.to(META))
    return statistics


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads, by file and function; of torch's own optimizer they are on the host."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            stack = traceback.extract_stack()
            if not any("/torch/optim/" in frame.filename for frame in stack):
                self.found[innermost(stack)] += 1
        return func(*args, **(kwargs or {}))


ON_THE_HOST = {
    "models/schedules.py grid",  # a scheduler's own table
    "process/grid.py check_grid",  # the grid is checked before it goes to the device
    "process/schedule.py check_inside",  # times of a process, float64 on the host
    "trainers/rollouts/costs.py measured_kl",  # how many steps are asked for their KL, of a mask on the host
}
"""Reads of tensors that are on the host whatever the device: they wait for nothing."""

AFTER_THE_REWARD = {
    "trainers/rollouts/failed.py counts",  # whether a reward failed on too many images to go on
    "objectives/advantages.py group_normalize",  # whether an image is alone in its group, or none was judged
    "trainers/value/inputs.py others_mean",  # whether an image is alone
    "trainers/rollouts/steps.py choose_steps",  # whether the grid ends in clean data, where nothing is learnt
}
"""Reads of the device that belong to a rollout: the host has waited for its reward, so that the queue is empty."""


@pytest.mark.parametrize("name", slow_but(("nft",), ONLINE))
def test_what_is_read_for_a_rollout_is_listed(name, tmp_path):
    make, own = {"grpo": (grpo, {}), "endpoint": (endpoint, {}), "nft": (endpoint, {"objective": Nft()})}[name]
    trainer = make(tmp_path, monitor=UNWATCHED, preflight=False, reward=lightness, learning=learning(2), **own)
    with Reads() as reads:
        trainer.train()
    assert set(reads.found) <= ON_THE_HOST | AFTER_THE_REWARD
    assert sum(count for name, count in reads.found.items() if name in AFTER_THE_REWARD) <= 2 * 6  # of two rollouts


def test_training_on_pairs_reads_no_number_but_those_of_the_update(tmp_path):
    trainer = trainer_of(tmp_path, updates=2)
    with Reads() as reads:
        trainer.train()
    assert not reads.found  # those of an update come as one list


def test_the_counts_are_of_what_waits():
    with Reads() as read:
        torch.ones(1).item()
    assert read.found == {"elsewhere": 1}
    with uploads() as uploaded:
        torch.ones(2).to(META), torch.tensor([1.0], device=META), torch.ones(2, device=META).to(META)
    assert uploaded == {"elsewhere": 2}
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(2, device=META) + torch.ones(2)
