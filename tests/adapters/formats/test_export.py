"""What lies on the disk as the files of other programs: LoRAs exactly, DoRAs and fine-tunes by the nearest LoRA."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from torch import nn

from rpo.adapters.formats import FORMATS
from rpo.adapters.formats.nearest import nearest
from rpo.adapters.formats.read import read_lora
from rpo.adapters.formats.verify import formats_in
from rpo.adapters.formats.write import PLACES
from rpo.adapters.lora import load_lora, save_lora
from rpo.cli.main import main
from rpo.models.checkpoint import Checkpoint
from tests.adapters.formats.loras import with_lora
from tests.adapters.formats.test_formats import predicted
from tests.tiny import save_tiny_sd, tiny_sd


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_sd(tmp_path_factory.mktemp("base") / "tiny"))


def test_singular_values_say_how_near_a_rank_comes():
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(12, 8, generator=generator)
    values = torch.linalg.svdvals(change)
    for rank in (1, 3, 8):
        layers, error = nearest([("unet.a", change)], rank)
        down, up = layers["unet.a"]
        wanted = (values[rank:].square().sum().sqrt() / values.square().sum().sqrt()).item()
        assert error == pytest.approx(wanted, abs=1e-6)
        assert (change - up @ down).norm() / change.norm() == pytest.approx(wanted, abs=1e-6)


def test_large_matrices_are_taken_apart_as_well_by_the_randomised_method():
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(1500, 4, generator=generator) @ torch.randn(4, 40, generator=generator)
    state = torch.get_rng_state()
    layers, error = nearest([("unet.a", change)], 4)
    assert error < 1e-5 and torch.equal(torch.get_rng_state(), state)
    assert layers["unet.a"][0].shape == (4, 40)


def test_a_run_is_exported_in_all_formats_and_each_is_compared_with_the_base(base, tmp_path, capsys):
    model = with_lora(tiny_sd, "mixed ranks")
    save_lora(model, tmp_path / "run/lora", formats=["diffusers"])
    assert main(["export", str(tmp_path / "run"), "--format", "all", "--base", base]) == 0
    told = capsys.readouterr().out
    assert formats_in(tmp_path / "run/export") == list(FORMATS)
    assert all(str(tmp_path / "run/export" / place) in told for place in PLACES.values())
    assert "compared" in told and "off by" not in told
    assert not list((tmp_path / "run/export").glob(".exporting-*"))


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_a_lora_of_another_program_becomes_diffusers_own_without_its_base(kind, tmp_path, capsys):
    model = with_lora(tiny_sd, "alpha")
    save_lora(model, tmp_path, formats=[kind])
    words = ["export", str(tmp_path / PLACES[kind]), "--format", "diffusers", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "not compared" in capsys.readouterr().out
    stock = tiny_sd()
    stock.load_lora_weights(str(tmp_path / "out"))
    assert (predicted(None, stock) - predicted(model)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def dora(tmp_path_factory):
    """A DoRA in diffusers' file, and what it predicts."""
    model, folder = with_lora(tiny_sd, "dora"), tmp_path_factory.mktemp("dora")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(model.denoiser))
    return folder, predicted(model)


def test_a_dora_becomes_a_lora_that_is_the_same_at_full_rank_and_says_how_far_it_is_off_below(
    dora, base, tmp_path, capsys
):
    errors = {}
    for rank in (4, 64):
        words = ["export", str(dora[0]), "--base", base, "--rank", str(rank), "--output", str(tmp_path / str(rank))]
        assert main(words) == 0
        errors[rank] = float(capsys.readouterr().out.partition("off by ")[2].partition("%")[0])
        model = Checkpoint(tiny_sd())
        load_lora(model, tmp_path / str(rank))
        errors[rank, "pred"] = (predicted(model) - dora[1]).abs().max().item()
    assert errors[4] > 1 and errors[64] == 0
    assert errors[64, "pred"] < 1e-4 < errors[4, "pred"]


def test_a_whole_fine_tune_becomes_a_lora_of_its_layers(base, tmp_path, capsys):
    pipe, generator = tiny_sd(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, layer in pipe.unet.named_modules():
            if name.endswith(("to_q", "conv1", "conv_in")):
                rows, columns = len(layer.weight), layer.weight[0].numel()
                change = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
                layer.weight += 0.05 * change.view_as(layer.weight)
    wanted = predicted(None, pipe)
    pipe.save_pretrained(tmp_path / "run/pipeline")
    assert main(["export", str(tmp_path / "run"), "--base", base, "--rank", "2"]) == 0
    assert "off by 0.00%" in capsys.readouterr().out
    layers, _ = read_lora(tmp_path / "run/export")
    changed = [name for name, one in pipe.unet.named_modules() if name.endswith(("to_q", "conv1", "conv_in"))]
    assert len(layers) == len(changed)
    for place in (PLACES["diffusers"], PLACES["kohya"]):
        model = Checkpoint(tiny_sd())
        load_lora(model, tmp_path / "run/export" / place)
        assert (predicted(model) - wanted).abs().max() < 1e-4


def test_what_no_lora_can_have_counts_as_error(base, tmp_path, capsys):
    pipe = tiny_sd()
    with torch.no_grad():
        for layer in pipe.unet.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.weight += 0.1
        pipe.unet.conv_in.weight[0] += 0.1
    pipe.save_pretrained(tmp_path / "tuned")
    assert main(["export", str(tmp_path / "tuned"), "--base", base, "--rank", "4"]) == 0
    assert float(capsys.readouterr().out.partition("off by ")[2].partition("%")[0]) > 50


def test_a_lower_rank_of_a_lora_is_a_smaller_file(base, tmp_path, capsys):
    save_lora(with_lora(tiny_sd), tmp_path, formats=["diffusers"])
    assert main(["export", str(tmp_path), "--rank", "2", "--base", base]) == 0
    assert "of rank 2" in capsys.readouterr().out
    assert {len(down) for down, _ in read_lora(tmp_path / "export")[0].values()} == {2}


@pytest.mark.parametrize(
    ("words", "says"), [([], "--base MODEL --rank N"), (["--rank", "4"], "DoRA"), (["--format", "kohya"], "DoRA")]
)
def test_a_dora_needs_its_base_and_a_rank(words, says, dora, capsys):
    assert main(["export", str(dora[0]), *words]) == 2
    assert says in capsys.readouterr().err


def test_a_lora_of_another_base_is_refused_and_nothing_is_written(base, tmp_path, capsys):
    save_lora(with_lora(lambda: tiny_sd(channels=(32, 64))), tmp_path / "wide")
    assert main(["export", str(tmp_path / "wide"), "--base", base, "--output", str(tmp_path / "out")]) == 2
    assert "in that size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
