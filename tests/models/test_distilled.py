"""Checkpoints that were distilled to a few steps: how they are known, and that each way out works."""

import pytest
import torch
from diffusers import LCMScheduler
from peft import LoraConfig

from rpo.adapters.loading import load_model
from rpo.adapters.lora import load_lora
from rpo.curation.curate_config import SourceConfig
from rpo.curation.generate import Drawer
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import ModelConfig
from tests.tiny import tiny_sd
from tests.tiny_flux2_klein import tiny_flux2_klein
from tests.trainers.pair_runs import trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")


def with_lcm_scheduler(pipe):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)


def named(pipe):
    pipe.register_to_config(_name_or_path="someone/model-turbo")


@pytest.mark.parametrize("alter", [with_lcm_scheduler, named])
def test_what_tells_is_named_with_the_ways_out_and_a_flag_overrules_it(alter):
    pipe = tiny_sd()
    alter(pipe)
    with pytest.raises(InputError, match="distilled.*train the base.*model.assistant.*model.allow_distilled"):
        Checkpoint(pipe)
    assert Checkpoint(pipe, allow_distilled=True).allow_distilled


def test_a_pipeline_whose_configuration_says_so_is_refused():
    with pytest.raises(InputError, match="configuration says is_distilled: .*model.allow_distilled"):
        Checkpoint(tiny_flux2_klein(is_distilled=True))
    assert Checkpoint(tiny_flux2_klein()).family.name == "FLUX.2 [klein] base"


@torch.no_grad()
def prediction(model):
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model.predict(x_t, torch.tensor([500, 20]), model.encode_prompts(["a cat", "a dog"]))


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("first"), updates=3, learning={"learning_rate": 3e-2})
    trainer.train()
    return trainer.save()


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that its name calls distilled."""
    tiny_sd().save_pretrained(tmp_path / "tiny-turbo")
    return tmp_path / "tiny-turbo"


def test_a_folder_is_refused_before_it_is_loaded_and_loads_by_the_flag(folder):
    with pytest.raises(InputError, match="'tiny-turbo' is called 'turbo'"):
        load_model(ModelConfig(source=str(folder)))
    assert load_model(ModelConfig(source=str(folder), allow_distilled=True)).allow_distilled


def test_the_assistant_is_in_use_while_training_and_left_out_of_what_is_saved(folder, assistant, tmp_path):
    plain = Checkpoint(tiny_sd())
    distilled = prediction(plain)
    load_lora(plain, assistant)
    undone = prediction(plain)

    model = load_model(ModelConfig(source=str(folder), assistant=str(assistant)))
    trainer = trainer_of(tmp_path / "run", pipe=model, updates=3, learning={"learning_rate": 1e-2})
    assert torch.equal(prediction(model), undone)
    trainer.train()
    with trainer.run.policy.reference():
        assert torch.equal(prediction(model), undone)
    with trainer.run.policy.deployed():
        trained = prediction(model)
        with trainer.run.policy.reference():
            assert torch.equal(prediction(model), distilled)
    assert not torch.allclose(prediction(model), trained, atol=1e-3)
    stock = tiny_sd()
    stock.load_lora_weights(str(trainer.save()))
    assert torch.allclose(prediction(Checkpoint(stock)), trained, atol=1e-5)


def test_an_assistant_is_for_training_alone(folder, assistant, tmp_path):
    config = ModelConfig(source=str(folder), assistant=str(assistant))
    assert torch.equal(prediction(load_model(config.deployed)), prediction(Checkpoint(tiny_sd())))
    source = SourceConfig(model=config, num_steps=2, guidance_scale=1.0)
    plain = SourceConfig(model=ModelConfig(source=str(folder), allow_distilled=True), num_steps=2, guidance_scale=1.0)
    assert Drawer(source).fingerprint == Drawer(plain).fingerprint
    pipe = tiny_sd()
    pipe.load_lora_weights(str(assistant), adapter_name="assistant")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "assistant")
    with pytest.raises(InputError, match="adapts text_encoder, too.*of the denoiser alone"):
        trainer_of(tmp_path, pipe=pipe)


def test_a_start_and_an_assistant_go_together(folder, assistant, tmp_path):
    config = ModelConfig(source=str(folder), assistant=str(assistant), lora=str(assistant))
    for reference in ("start", "base"):
        model = load_model(config)
        both = prediction(model)
        place = tmp_path / reference
        trainer = trainer_of(place, pipe=model, updates=2, adapter={"reference": reference})
        assert torch.allclose(prediction(model), both, atol=1e-5)
        trainer.train()
        with trainer.run.policy.deployed():
            deployed = prediction(model)
        stock = tiny_sd()
        stock.load_lora_weights(str(trainer.save()))
        assert torch.allclose(prediction(Checkpoint(stock)), deployed, atol=1e-5)
