"""The notebooks are plain, hold no outputs, and run from top to bottom."""

import ast
import base64
import io
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from rpo.shapes.critic import ShapesCritic
from rpo.shapes.instructor import ShapesInstructor
from tests.curation.vlm.fake_server import SMALL_QUESTION, Response, fake_server, text_of

FOLDER = Path(__file__).parents[2] / "examples/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_CELLS = 16


def cells(path, kind):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_short_and_as_it_is_before_it_is_run(path):
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len(whole["cells"]) <= MAX_CELLS and len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    code = [cell for cell in whole["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    first, *others = cells(path, "code")
    assert re.search(r"^# !pip install '?rpo", first, re.MULTILINE) and not ast.parse(first).body  # commented out
    assert all(find_spec(name) for text in others for name in imported(text))
    for text in cells(path, "markdown"):
        links = re.findall(r"\]\(([\w./]+)\)", text)
        assert all((FOLDER / link).exists() for link in links), links
        assert all((FOLDER.parents[1] / name).exists() for name in re.findall(r"`((?:docs|configs)/[\w.]+)`", text))


def imported(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def executed(path):
    names: dict = {"__name__": "__main__"}
    for code in cells(path, "code"):
        exec(compile(re.sub(r"\bupdates=\d+", "updates=2, progress=False", code), path.name, "exec"), names)  # noqa: S102
    return names


def seeing(request):
    """A model that sees as the critic of `shapes` does."""
    (url,) = (part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url")
    text = text_of(request)
    if text == SMALL_QUESTION:
        return Response('{"ok": true}')
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    caption = json.loads(re.findall(r'Caption: (".*?")', text)[-1])
    (critique,) = ShapesCritic()([image], [caption])
    if request["response_format"]["json_schema"]["name"] == "Instructions":
        (critique,) = ShapesInstructor()([image], [caption], [critique])
    return Response(critique.model_dump_json())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake_server(seeing) as server:
        monkeypatch.setenv("VLM_URL", server.url)
        names = executed(path)
    found = list(tmp_path.rglob("pytorch_lora_weights.safetensors"))
    assert found
    if path.stem == "curate_with_a_vlm":
        assert len(server.texts()) >= 16 and any("critique" in pair.details for pair in names["pairs"])
