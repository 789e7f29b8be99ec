"""Names of models on the Hub, as sentence-transformers takes them, in every command that opens a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.library_models import write_clip, write_embedder
from tests.loopback_hub import serving
from tests.search.conftest import write_model, write_picture

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")
pytest.importorskip("fastapi", reason="the extra 'serve'")
pytest.importorskip("sentence_transformers")

# The address of the Hub is read when its library is imported.
COMMANDS = """
import json, sys
from tests.cli.runner import invoke
from xfm_fast.benchmarks.work import trial
from xfm_fast.encoders import open_encoder
from xfm_fast.serve import SourceOptions, load

name, folder, is_xfm = *sys.argv[1:3], sys.argv[3:] == ["xfm"]
options = ["--model", name, "--device", "cpu"]
for command in (
    ["index", folder],
    ["search", folder, "a red circle", "--json"],
    ["embed", f"{folder}/shard.jsonl", "--out", f"{folder}/out"],
):
    done = invoke([*command, *options])
    assert done.exit_code == 0, (command, done.output)
served = load(name, SourceOptions(device="cpu"), 0)
tried = None if is_xfm else type(trial.open_model(name).model).__name__
kind = type(open_encoder(name)).__name__
print(json.dumps([kind, served.name, served.modalities, tried]))
"""


def write_clip_of_sentence_transformers(folder: Path) -> Path:
    """Write a CLIP whose files are all in the folder of its module, as in clip-ViT-B-32."""
    write_clip(folder / "0_CLIPModel")
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel"}
    module["type"] = "sentence_transformers.models.CLIPModel"
    (folder / "modules.json").write_text(json.dumps([module]))
    versions: dict[str, Any] = {"__version__": {"sentence_transformers": "2.0.0"}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(versions))
    return folder


def run(code: str, *arguments: object, **environment: str) -> str:
    """Run code in another process; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "sentence-transformers/all-MiniLM-L6-v2": write_embedder(root / "texts"),
        "sentence-transformers/clip-ViT-B-32": write_clip_of_sentence_transformers(root / "clip"),
        "org/xfm": write_model(root / "xfm", seed=0),
    }


@pytest.mark.parametrize(
    ("name", "kind", "modalities", "tried"),
    [
        ("all-MiniLM-L6-v2", "LibraryEncoder", ["text"], "BertModel"),
        ("clip-ViT-B-32", "LibraryEncoder", ["text", "image"], "CLIPModel"),
        ("sentence-transformers/clip-ViT-B-32", "LibraryEncoder", ["text", "image"], "CLIPModel"),
        ("org/xfm", "XFMEncoder", ["text", "image"], None),
    ],
)
def test_every_command_opens_a_name(
    name: str,
    kind: str,
    modalities: list[str],
    tried: str | None,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "shard.jsonl").write_text('{"text": "a red circle"}\n')
    if "image" in modalities:
        write_picture(folder / "0.png", 0)
    else:
        (folder / "note.txt").write_text("a red circle")
    with serving(models) as address:
        arguments = [name, folder, *(["xfm"] if tried is None else [])]
        printed = run(COMMANDS, *arguments, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
    assert json.loads(printed) == [kind, name, modalities, tried]


def test_an_error_without_a_network_says_so(tmp_path: Path) -> None:
    code = (
        "from xfm_fast.encoders import open_encoder\n"
        "from xfm_fast.errors import CheckpointError\n"
        "try:\n    open_encoder('all-MiniLM-L6-v2')\n"
        "except CheckpointError as error:\n    print(error)"
    )
    printed = run(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "all-MiniLM-L6-v2" in printed
    assert "connect" in printed
