"""Shards are read back, and a table of contents that wants to run something is refused by name and runs nothing."""

from __future__ import annotations

import builtins
import functools
import importlib
import json
import operator
import os
import pickle
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.cli.runner import invoke
from tests.training.small_runs import run, small_recipe
from xfm_fast.errors import CheckpointError
from xfm_fast.models.xfm import XFM
from xfm_fast.training import checkpoints
from xfm_fast.training.gradient_flow import gradient_flow_of
from xfm_fast.training.recipe import Recipe
from xfm_fast.training.shards import read_contents, read_shards

TENSORS = {"model/a": torch.arange(12.0).reshape(4, 3), "optimizer/a/exp_avg": torch.ones(4, 3, dtype=torch.bfloat16)}


class Call:
    """A pickle of this calls a function when it is opened."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    # What a pickle calls must be callable when it is made.
    def __call__(self, *arguments: Any) -> None: ...

    def __reduce__(self) -> Any:
        return self.call


class Named:
    """A pickle of this names something by module and dotted name and calls it."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments

    def pickled(self) -> bytes:
        def text(value: str) -> bytes:
            return b"\x8c" + bytes([len(value)]) + value.encode()

        called = text(self.module) + text(self.name)
        return b"\x80\x04" + called + b"\x93(" + b"".join(map(text, self.arguments)) + b"tR."


GADGETS: dict[str, Callable[[str], Any]] = {
    "posix.system": lambda command: Call(os.system, command),
    "builtins.eval": lambda command: Call(eval, f"__import__('os').system({command!r})"),
    "builtins.exec": lambda command: Call(exec, f"import os; os.system({command!r})"),
    "builtins.map": lambda command: Call(Call(map, os.system, [command])),
    "builtins.__import__": lambda _: Call(builtins.__import__, "antigravity"),
    "subprocess.Popen": lambda command: Call(subprocess.Popen, ["sh", "-c", command]),
    "subprocess.check_output": lambda command: Call(subprocess.check_output, ["sh", "-c", command]),
    "importlib.import_module": lambda _: Call(importlib.import_module, "antigravity"),
    "functools.partial": lambda command: Call(functools.partial(os.system, command)),
    "operator.methodcaller": lambda _: Call(operator.methodcaller("unlink"), Path("canary")),
    "numpy.load": lambda command: Call(numpy.load, command),
    "torch.storage._load_from_bytes": lambda command: Call(
        torch.storage._load_from_bytes, pickle.dumps(Call(os.system, command))
    ),
}


def plant_everywhere(genuine: bytes) -> list[tuple[str, Callable[[Any], Metadata]]]:
    """Every field of every object of a table, and how to put something there."""

    def at(change: Callable[[Metadata, Any], Any]) -> Callable[[Any], Metadata]:
        def planted(evil: Any) -> Metadata:
            table = pickle.loads(genuine)
            change(table, evil)
            return table

        return planted

    def field(find: Callable[[Metadata], Any], name: str) -> Callable[[Any], Metadata]:
        return at(lambda table, evil: object.__setattr__(find(table), name, evil))

    def entry(table: Metadata) -> Any:
        return table.state_dict_metadata["model/a"]

    def indexed(table: Metadata, evil: Any) -> None:
        (index, place), *_ = table.storage_data.items()
        table.storage_data = {index: place, evil: place}

    plants = [(name, field(lambda table: table, name)) for name in vars(pickle.loads(genuine))]
    plants += [(f"entry.{name}", field(entry, name)) for name in ("properties", "size", "chunks")]
    plants += [(f"chunk.{name}", field(lambda t: entry(t).chunks[0], name)) for name in ("offsets", "sizes")]
    plants += [(f"dtype.{name}", field(lambda t: entry(t).properties, name)) for name in ("dtype", "layout")]
    plants += [
        (f"place.{name}", field(lambda t: next(iter(t.storage_data.values())), name))
        for name in ("relative_path", "offset", "length", "transform_descriptors")
    ]
    plants += [
        (f"index.{name}", field(lambda t: next(iter(t.storage_data)), name)) for name in ("fqn", "index", "extra")
    ]
    plants += [(f"meta.{name}", field(lambda t: t.storage_meta, name)) for name in ("checkpoint_id", "modules")]
    plants.append(("an entry", at(lambda t, evil: t.state_dict_metadata.update({"model/b": evil}))))
    plants.append(("a chunk", at(lambda t, evil: entry(t).chunks.append(evil))))
    plants.append(("a key", at(indexed)))
    plants.append(("nested", at(lambda t, evil: setattr(t, "planner_data", {"a": [({"b": (evil,)},)]}))))
    return plants


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "sharded"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(TENSORS), checkpoint_id=folder)
    return folder


@pytest.fixture
def copied(tmp_path: Path, shards: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "sharded"))


def like(name: str) -> Tensor | None:
    return TENSORS.get(name)


def test_genuine_shards_are_read(shards: Path) -> None:
    found = read_shards(shards, like)
    assert found.keys() == TENSORS.keys()
    for name, tensor in found.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
    assert read_shards(shards, lambda name: like(name) if name == "model/a" else None).keys() == {"model/a"}
    with pytest.raises(CheckpointError, match=r"model/a has shape \(4, 3\) instead of \(3, 4\)"):
        read_shards(shards, lambda _: torch.ones(3, 4))


@pytest.mark.parametrize("gadget", GADGETS)
def test_what_runs_something_is_refused_by_name(copied: Path, gadget: str) -> None:
    canary = copied.parent / "canary"
    table = pickle.loads((copied / ".metadata").read_bytes())
    table.planner_data = GADGETS[gadget](f"touch {canary}")
    (copied / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match=rf"sharded/\.metadata asks for _?{gadget}, .* nothing was run: delete"):
        read_shards(copied, like)
    assert not canary.exists()


def test_it_is_refused_in_every_field(copied: Path) -> None:
    genuine, canary = (copied / ".metadata").read_bytes(), copied.parent / "canary"
    plants = plant_everywhere(genuine)
    assert len(plants) > 20
    for where, planted in plants:
        (copied / ".metadata").write_bytes(pickle.dumps(planted(Call(os.system, f"touch {canary}"))))
        with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
            read_shards(copied, like)
        assert not canary.exists(), where


def test_the_attack_works_where_it_is_not_refused(copied: Path) -> None:
    """PyTorch's own reader runs it, so these tests test something."""
    canary = copied.parent / "canary"
    table = plant_everywhere((copied / ".metadata").read_bytes())[-1][1](Call(os.system, f"touch {canary}"))
    (copied / ".metadata").write_bytes(pickle.dumps(table))
    dcp.FileSystemReader(copied).read_metadata()
    assert canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        Named("os", "system", "true").pickled(),
        Named("pathlib", "PosixPath.unlink", "canary").pickled(),
        Named("torch", "hub.load", "a", "b").pickled(),
        Named("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__", "a").pickled(),
        Named("torch.distributed.checkpoint.filesystem", "os.system", "true").pickled(),
        Named("torch.serialization", "load", "a").pickled(),
    ],
)
def test_dotted_names_are_unknown(copied: Path, content: bytes) -> None:
    (copied / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"asks for .* nothing was run"):
        read_contents(copied)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x80", b"no pickle", pickle.dumps(3), pickle.dumps([]), pickle.dumps({"state_dict_metadata": {}}),
        pickle.dumps(Metadata({})), pickle.dumps(Metadata({}, storage_data=[])), b"\x80\x04\x95" + b"\xff" * 8,
        b"\x80\x04r\xff\xff\xff\xff.", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x04\x82\x01.",
        b"Pid\n.", pickle.dumps(Call(Call(getattr, Metadata, "__init__"), 1)),
        pickle.dumps(Call(dcp.metadata.Metadata, {}, state=(None, {"__init__": 1}))), pickle.dumps(Metadata),
    ],
)  # fmt: skip
def test_what_is_no_table_is_named(copied: Path, content: bytes) -> None:
    (copied / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sharded/\.metadata (is no table of contents|asks for)"):
        read_contents(copied)


def altered(folder: Path, change: Callable[[Metadata], Any]) -> None:
    table = pickle.loads((folder / ".metadata").read_bytes())
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def test_nothing_else_than_tensors_is_opened(copied: Path) -> None:
    """An entry of bytes is a pickle of its own, which PyTorch would open unchecked."""
    canary = copied.parent / "canary"
    evil = pickle.dumps(Call(os.system, f"touch {canary}"))

    def as_bytes(table: Metadata) -> None:
        table.state_dict_metadata["model/a"] = BytesStorageMetadata()
        place = table.storage_data[MetadataIndex("model/a", (0, 0))]
        table.storage_data[MetadataIndex("model/a")] = place
        place.offset, place.length = 0, len(evil)
        (copied / place.relative_path).write_bytes(evil)

    altered(copied, as_bytes)
    with pytest.raises(CheckpointError, match=r"asks for .*BytesStorageMetadata"):
        read_shards(copied, like)
    assert not canary.exists()


def test_a_file_of_shards_that_runs_something_is_refused(copied: Path) -> None:
    canary = copied.parent / "canary"
    (file,) = copied.glob("*.distcp")
    torch.save(Call(os.system, f"touch {canary}"), file)
    whole = {"offset": 0, "length": file.stat().st_size}
    altered(copied, lambda table: [vars(place).update(whole) for place in table.storage_data.values()])
    with pytest.raises(CheckpointError, match=r"cannot be read \(a file .* posix\.system, .* nothing was run\)"):
        read_shards(copied, like)
    assert not canary.exists()


def _chunk(offsets: Any, sizes: Any) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [vars(place).update(relative_path="../secret.distcp") for place in t.storage_data.values()],
        lambda t: [vars(place).update(relative_path="/etc/passwd") for place in t.storage_data.values()],
        lambda t: [vars(place).update(relative_path=3) for place in t.storage_data.values()],
        lambda t: [vars(place).update(transform_descriptors=("stream.zstd",)) for place in t.storage_data.values()],
        lambda t: [vars(place).update(offset="0") for place in t.storage_data.values()],
        lambda t: [vars(place).update(length=True) for place in t.storage_data.values()],
        lambda t: t.state_dict_metadata.update(
            {"model/a": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 3)), [])}
        ),
        lambda t: setattr(t.state_dict_metadata["model/a"], "chunks", [_chunk((0, 0), (2, 3))]),
        lambda t: setattr(t.state_dict_metadata["model/a"], "chunks", [_chunk((1, 0), (4, 3))]),
        lambda t: setattr(t.state_dict_metadata["model/a"], "chunks", [_chunk((0, 0), (12,))]),
        lambda t: setattr(t.state_dict_metadata["model/a"], "size", (4, 3)),
        lambda t: setattr(t.state_dict_metadata["model/a"], "properties", None),
        lambda t: t.state_dict_metadata.update({3: t.state_dict_metadata["model/a"]}),
        lambda t: setattr(t, "state_dict_metadata", None),
    ],
)
def test_a_table_that_lies_is_refused(copied: Path, change: Callable[[Metadata], Any]) -> None:
    altered(copied, change)
    with pytest.raises(CheckpointError, match=r"\.metadata is no table of contents"):
        read_shards(copied, like)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [vars(place).update(offset=10**12) for place in t.storage_data.values()],
        lambda t: [vars(place).update(relative_path="__7_7.distcp") for place in t.storage_data.values()],
        lambda t: t.storage_data.clear(),
    ],
)
def test_tensors_that_are_not_there_are_named(copied: Path, change: Callable[[Metadata], Any]) -> None:
    altered(copied, change)
    with pytest.raises(CheckpointError, match=r"tensors in .* cannot be read"):
        read_shards(copied, like)


RECIPE = """
model: {preset: tiny, vision_depth: 1, text_layers: 1, fusion_layers: 1, vocab_size: 320}
data: %s
shapes: {train: 8, val: 1, test: 1}
streams: {text: {kind: text, paths: texts_train.jsonl, batch_size: 2, max_tokens: 24}}
updates: [[text]]
steps: 1
device: cpu
checkpoint: {folder: %s, every: 1}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(RECIPE % (folder / "world", folder / "run"))
    assert invoke(["pretrain", folder / "recipe.yaml"]).exit_code == 0
    return folder


def attacked(finished: Path, folder: Path, shards: Path, *, says_so: bool) -> Path:
    """A copy of a checkpoint with an evil table, sealed again by the attacker; its canary is beside the run."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE % (folder / "world", folder / "run"))
    (path,) = (folder / "run/checkpoints").iterdir()
    shutil.copytree(shards, path / "sharded")
    altered(path / "sharded", lambda t: setattr(t, "planner_data", Call(os.system, f"touch {folder / 'canary'}")))
    state = json.loads((path / "state.json").read_text())
    if says_so:
        state["sharded"] = True
        shutil.rmtree(path / "model")
    else:
        del state["sharded"]
    (path / "state.json").write_text(json.dumps(state))
    (path / "manifest.json").unlink()
    checkpoints._seal(path)
    return path


@pytest.mark.parametrize("says_so", [True, False])
def test_an_attacked_checkpoint_runs_nothing(tmp_path: Path, finished: Path, shards: Path, says_so: bool) -> None:
    """By `gradflow`, by `pretrain` that goes on from it, and by the API; and it is not even opened beside a model."""
    path = attacked(finished, tmp_path, shards, says_so=says_so)
    recipe = tmp_path / "recipe.yaml"
    commands = (["gradflow", str(path)], ["gradflow", str(tmp_path / "run")], ["pretrain", str(recipe), "steps=2"])
    for command in commands:
        if says_so and command[1] == str(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run/model", ignore_errors=True)
        result = invoke(command)
        assert not (tmp_path / "canary").exists(), command
        if says_so:
            assert result.exit_code == 2, command
            assert "asks for posix.system" in result.stderr
        else:
            assert result.exit_code == 0, result.output
    if says_so:
        state = json.loads((path / "state.json").read_text())
        with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
            gradient_flow_of(path)
        with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
            checkpoints.load_weights(path, XFM(Recipe(**state["recipe"]).model))
        assert not (tmp_path / "canary").exists()


def test_a_checkpoint_says_whether_it_is_sharded(tmp_path: Path) -> None:
    run(small_recipe(tmp_path, steps=1))
    found = checkpoints.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.state["sharded"] is False
    assert not checkpoints.is_sharded(found.path)
    assert not checkpoints.is_sharded(tmp_path)
    (tmp_path / "state.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        checkpoints.is_sharded(tmp_path)
