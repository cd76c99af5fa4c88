"""`rpo train` on a divided base, of any family: all processes draw what one alone used to, and one writes."""

import pytest
import torch
from safetensors.torch import load_file

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.config.load import load_config
from rpo.data.writers import write_pairs
from rpo.runs.train import run
from rpo.runs.train_config import DPORunConfig
from tests.contracts.families import FAMILIES
from tests.forked import together
from tests.tiny import tiny_sd3
from tests.trainers.pair_runs import toy_pairs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the network denoises no better")]

WORDS = ["learning.updates=2", "learning.learning_rate=1e-3", "pairs_per_update=4", "learning.progress=false"]
WORDS += [
    "learning.sharding=full",
    "learning.micro_batch=2",
    "resolution=64",
    "preview_every=1",
    "learning.warmup_updates=0",
]
JUDGED = "held_out={count: 2, num_steps: 2, guidance_scale: 2.0, reward: jpeg-compressibility, prompts: PLACE}"


def divided(root, *more):
    words = [*WORDS, f"model.source={root / 'base'}", f"data.source={root / 'pairs'}", f"output={root / 'run'}", *more]
    result = run(load_config(DPORunConfig, None, words))
    return result.saved, result.report, result.aligned and result.aligned.means


def test_all_draw_what_is_judged_and_shown_and_one_writes(tmp_path):
    tiny_sd3().save_pretrained(tmp_path / "base")
    write_pairs(tmp_path / "pairs", toy_pairs())
    (tmp_path / "held_out.txt").write_text("a house\ntwo dogs\n")
    judged = JUDGED.replace("PLACE", str(tmp_path / "held_out.txt"))
    main, other = together(2, tmp_path / "answers", divided, tmp_path, judged)
    assert main[1].is_file() and other[1] is None
    assert main[2] == other[2] and len(main[2]) > 0
    assert [one.name for one in sorted((tmp_path / "run" / "previews").iterdir())] == [
        f"update-{update:06d}.png" for update in range(3)
    ]
    assert "jpeg-compressibility" in (main[0] / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_divided(tmp_path, family):
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    write_pairs(tmp_path / "pairs", toy_pairs())
    saved = together(2, tmp_path / "answers", divided, tmp_path, "report=false", "preview_every=0")[0][0]
    assert any(bool(tensor.any()) for name, tensor in load_file(saved / WEIGHT_FILE).items())
    assert torch.get_num_threads() == 1
