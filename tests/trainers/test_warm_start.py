"""A LoRA that a checkpoint carries is where training starts: what the reference is, what is saved, what is refused."""

import pytest
import torch
from peft import LoraConfig

from rpo.adapters.lora import load_lora, reference
from rpo.adapters.lora_file import inspect_lora
from rpo.models.checkpoint import Checkpoint
from rpo.trainers.identity import base_identity
from tests.tiny import tiny_sd
from tests.trainers.pair_runs import trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A LoRA of the tiny checkpoint that does something."""
    folder = tmp_path_factory.mktemp("first")
    trainer = trainer_of(folder, updates=3, learning={"learning_rate": 3e-2}, adapter={"rank": 2})
    trainer.train()
    return trainer.save()


@torch.no_grad()
def prediction(model):
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model.predict(x_t, torch.tensor([500, 20]), model.encode_prompts(["a cat", "a dog"]))


def warm(first, strength=1.0):
    pipe = tiny_sd()
    pipe.load_lora_weights(str(first), adapter_name="mine")
    pipe.set_adapters(["mine"], [strength])
    return pipe


def run(folder, pipe, **adapter):
    return trainer_of(folder, pipe=pipe, updates=3, learning={"learning_rate": 1e-2}, adapter={"rank": 3, **adapter})


@pytest.mark.parametrize("strength", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_the_start_is_the_reference_and_what_is_saved_is_one_lora_of_the_base(first, strength, tmp_path):
    start, base = prediction(Checkpoint(warm(first, strength))), prediction(Checkpoint(tiny_sd()))
    trainer = run(tmp_path, warm(first, strength))
    model = trainer.run.model
    frozen = {name: one.clone() for name, one in model.denoiser.named_parameters() if ".mine." in name}
    assert torch.equal(prediction(model), start)
    assert "starts from the LoRA mine" in trainer.plan()
    trainer.train()
    assert all(torch.equal(one, frozen[name]) for name, one in model.denoiser.named_parameters() if name in frozen)
    trained = prediction(model)
    with trainer.run.policy.reference():
        assert torch.equal(prediction(model), start)
    assert torch.equal(prediction(model), trained)
    assert (trained - start).abs().max() > 1e-3
    saved = trainer.save()
    stock = tiny_sd()
    stock.load_lora_weights(str(saved))
    assert (prediction(Checkpoint(stock)) - trained).abs().max() < 1e-4 * (trained - base).abs().max()
    assert (inspect_lora(saved).ranks, inspect_lora(saved).is_portable) == ((5,), True)


def test_held_near_the_base_the_lora_itself_is_trained(first, tmp_path):
    start, base = prediction(Checkpoint(warm(first))), prediction(Checkpoint(tiny_sd()))
    trainer = run(tmp_path, warm(first), reference="base")
    model = trainer.run.model
    assert torch.allclose(prediction(model), start, atol=1e-6)
    with trainer.run.policy.reference():
        assert torch.equal(prediction(model), base)
    trainer.run.policy.save(tmp_path / "untouched")
    assert inspect_lora(trainer.save()).ranks == (2,)
    stock = tiny_sd()
    stock.load_lora_weights(str(tmp_path / "untouched"))
    assert torch.allclose(prediction(Checkpoint(stock)), start, atol=1e-6)


def test_a_killed_run_goes_on_in_the_same_bits_and_not_from_another_start(first, tmp_path):
    whole = run(tmp_path / "whole", warm(first))
    whole.train()
    cut = trainer_of(
        tmp_path / "cut", pipe=warm(first), updates=2, learning={"learning_rate": 1e-2}, adapter={"rank": 3}
    )
    cut.train()
    resumed = run(tmp_path / "cut", warm(first))
    resumed.train(resume=True)
    assert torch.equal(prediction(resumed.run.model), prediction(whole.run.model))
    with pytest.raises(ValueError, match=r"base\.lora"):
        run(tmp_path / "cut", warm(first, 0.5)).train(resume=True)


def test_a_start_is_part_of_what_the_reference_is_known_by(first):
    known = [base_identity(Checkpoint(pipe)) for pipe in (tiny_sd(), warm(first), warm(first, 0.5))]
    assert len({one.get("base.lora") for one in known}) == 3
    assert len({one["base.unet"] for one in known}) == 1


def test_a_file_is_a_start_by_its_name_in_the_settings(first, tmp_path):
    model = Checkpoint(tiny_sd())
    load_lora(model, first)
    assert torch.equal(prediction(model), prediction(Checkpoint(warm(first))))
    trainer = run(tmp_path, model)
    trainer.train()
    with reference(trainer.run.model.denoiser):
        assert torch.equal(prediction(trainer.run.model), prediction(Checkpoint(tiny_sd())))


def text_lora(pipe):
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "words")


def test_a_lora_of_the_text_encoder_is_kept_in_what_is_saved(first, tmp_path):
    pipe = warm(first)
    text_lora(pipe)
    trainer = run(tmp_path, pipe)
    trainer.train()
    trained = prediction(trainer.run.model)
    stock = tiny_sd()
    stock.load_lora_weights(str(trainer.save()))
    assert torch.allclose(prediction(Checkpoint(stock)), trained, atol=1e-5)
    pipe = warm(first)
    text_lora(pipe)
    with pytest.raises(ValueError, match="adapts text_encoder, too.*reference: start"):
        run(tmp_path / "base", pipe, reference="base")


MISTAKES = {
    "merged": (lambda pipe: pipe.fuse_lora(), {}, "is merged into the weights"),
    "off": (lambda pipe: pipe.disable_lora(), {}, "is switched off"),
    "full": (lambda pipe: None, {"train": "full"}, "already carries an adapter"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_no_start_is_refused(name, first, tmp_path):
    alter, adapter, message = MISTAKES[name]
    pipe = warm(first)
    alter(pipe)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, pipe, **adapter)
