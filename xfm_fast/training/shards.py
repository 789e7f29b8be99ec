"""Tensors that are sharded over processes, in the files of `torch.distributed.checkpoint`; no file is trusted.

PyTorch's table of contents, `.metadata`, is a pickle, and PyTorch's reader runs what a pickle names. A checkpoint may
come from anywhere, and the digests in its manifest with it. So the table is read into inert records here: only names
that a real one holds are known, and none of them is the class or function that it names. What the records say is
checked and copied into the table that PyTorch gets, which then reads the tensors with `weights_only=True`.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from xfm_fast.documents import read_bytes
from xfm_fast.errors import CheckpointError

CONTENTS = ".metadata"
# Some hundred bytes for each shard of each tensor.
_MOST_BYTES = 1 << 28
_ANOTHER = "delete that checkpoint to go on from an earlier one, or set checkpoint.folder to a new folder"


def write_shards(tensors: dict[str, Any], folder: Path) -> str:
    """Write the parts of some tensors that this process holds; all processes must call it.

    Returns:
        Why it failed, in words; empty where all is written.
    """
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except (OSError, CheckpointException) as error:
        return str(error) or type(error).__name__
    return ""


def read_shards(folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Tensors of a folder by name, each sharded over processes as `like(name)` is; all processes must call it.

    Names for which `like` has nothing are left out.

    Raises:
        CheckpointError: the table of contents names what no such table holds, is damaged, or has other shapes than
            `like`; or a tensor cannot be read. Nothing that the files name has run.
    """
    contents = read_contents(folder)
    shards: dict[str, Any] = {}
    for name, found in contents.state_dict_metadata.items():
        if (wanted := like(name)) is not None:
            assert isinstance(found, TensorStorageMetadata)
            if found.size != wanted.shape:
                raise CheckpointError(
                    f"{folder} does not fit this run: {name} has shape {tuple(found.size)} instead of "
                    f"{tuple(wanted.shape)}; set checkpoint.folder to a new folder"
                )
            shards[name] = torch.empty_like(wanted, requires_grad=False)
    try:
        with warnings.catch_warnings():
            # One process alone reads all shards, which is meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(shards, storage_reader=_Reader(folder, contents))
    except CheckpointException as error:
        why = min((_in_words(reason) for reason, _ in error.failures.values()), default=str(error))
        # PyTorch's own message advises to open the file without a check.
        if refused := re.search(r"GLOBAL (\S+)", why):
            why = f"a file of it asks for {refused[1]}, which is no tensor; nothing was run"
        raise CheckpointError(f"the tensors in {folder} cannot be read ({why[:300]}); {_ANOTHER}") from None
    return shards


def read_contents(folder: Path) -> Metadata:
    """The table of contents of a folder, checked.

    Raises:
        CheckpointError: as `read_shards`.
    """
    path = folder / CONTENTS
    try:
        return _contents(_Unpickler(io.BytesIO(read_bytes(path, _MOST_BYTES))).load())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_ANOTHER}") from None
    except _UnknownName as error:
        raise CheckpointError(
            f"{path} asks for {error}, which a table of contents has no use for; it was refused and nothing was run: "
            f"{_ANOTHER}"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} is no table of contents, or a damaged one ({_in_words(error)[:300]}); {_ANOTHER}"
        ) from None


def _in_words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Record:
    """Stands for any object in a pickle: keeps what it was made from and does nothing with it."""

    def __new__(cls, *arguments: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = None
        return record

    arguments: tuple[Any, ...]
    state: Any

    # Without this, a pickle could set attributes of a record, and of its class.
    def __setstate__(self, state: Any) -> None:
        self.state = state


# Every class and function that real tables hold, by whatever version of Python (3.11 to 3.14) and PyTorch (2.9 on);
# some releases of Python 3.11 pickle members of an enumeration as `getattr(class, name)`.
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
    "builtins": ("getattr",),
}
_RECORDS = {name: type(name, (_Record,), {}) for names in _NAMES.values() for name in names}


class _UnknownName(Exception):
    """A name in a pickle that real tables do not hold."""


# The one in Python, whose memory grows with the file and not with the numbers in it.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return _RECORDS[name]
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _UnknownName(f"{module}.{name}")


def _contents(table: Any) -> Metadata:
    table = _state(table, "Metadata")
    tensors: dict[str, Any] = {}
    for name, entry in table["state_dict_metadata"].items():
        # Whatever is no tensor would be another pickle, which PyTorch opens without a check; none is ever written.
        values = _state(entry, "TensorStorageMetadata")
        size, dtype = _size(values["size"]), _state(values["properties"], "TensorProperties", tuple)[0]
        chunks, inside, filled = [], True, 0
        for chunk in values["chunks"]:
            state = _state(chunk, "ChunkStorageMetadata")
            offsets, sizes = _size(state["offsets"]), _size(state["sizes"])
            bounds = zip(offsets, sizes, size, strict=True)
            inside &= all(offset >= 0 <= length and offset + length <= end for offset, length, end in bounds)
            filled += sizes.numel()
            chunks.append(ChunkStorageMetadata(offsets, sizes))
        # Memory that no chunk fills would stay as it happened to be.
        if not inside or filled != size.numel():
            raise ValueError(f"the chunks of {name} do not make it up")
        tensors[_of_type(name, str)] = TensorStorageMetadata(
            TensorProperties(dtype=_of_type(dtype, torch.dtype)), size, chunks
        )
    places: dict[Any, Any] = {}
    for index, place in table["storage_data"].items():
        index, place = _state(index, "MetadataIndex"), _state(place, "_StorageInfo")
        file = _of_type(place["relative_path"], str)
        if not re.fullmatch(r"[\w-]+\.distcp", file) or place.get("transform_descriptors"):
            raise ValueError(f"{file!r} is no file of shards")
        offset, length = _of_type(place["offset"], int), _of_type(place["length"], int)
        places[MetadataIndex(_of_type(index["fqn"], str), _size(index["offset"]))] = _StorageInfo(file, offset, length)
    return Metadata(tensors, storage_data=places)


def _state(record: Any, name: str, kind: type = dict) -> Any:
    if type(record) is not _RECORDS[name]:
        raise ValueError(f"{type(record).__name__} in place of {name}")
    return _of_type(record.state, kind)


def _size(record: Any) -> torch.Size:
    if type(record) is not _RECORDS["Size"]:
        raise ValueError(f"{type(record).__name__} in place of torch.Size")
    return torch.Size([_of_type(length, int) for length in _of_type(record.arguments[0], tuple)])


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader with a table of contents that is read already."""

    def __init__(self, folder: Path, contents: Metadata) -> None:
        super().__init__(folder)
        self._contents = contents

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._contents
