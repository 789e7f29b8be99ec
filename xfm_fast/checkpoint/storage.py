"""Write a model to a folder and read it back; a failure at any moment leaves what was there before."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from xfm_fast.checkpoint.reading import read_state_dict
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, StorageError

FORMAT_VERSION = 1
CONFIG_FILE, MODEL_FILE, UNUSED_FILE = "config.json", "model.safetensors", "unused.safetensors"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class PretrainedFiles(NamedTuple):
    """The content of a folder that `save_pretrained` wrote."""

    config: XFMConfig
    state: dict[str, Tensor]
    unused: dict[str, Tensor] | None


def save_pretrained(
    module_state: Mapping[str, Tensor],
    config: XFMConfig,
    dir: str | os.PathLike[str],
    *,
    unused: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`, and `unused.safetensors` when there are `unused`, into `dir`.

    All files are complete on disk under temporary names before the first one takes its place, so a full disk or a
    killed process leaves an earlier save as it was (only between two renames, which take no space, could one of the
    files be new and another old). An `unused.safetensors` of an earlier save is removed where there are no `unused`,
    since it belongs to other weights. Tensors are written one at a time without a second copy of the model.

    Raises:
        StorageError: the folder or a file cannot be written.
        CheckpointError: a tensor has a dtype that safetensors cannot hold.
    """
    folder = Path(dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"folder {folder} cannot be made ({_reason(error)}); choose another folder") from error
    writers: dict[Path, Callable[[BinaryIO], object]] = {
        folder / MODEL_FILE: lambda file: write_safetensors(file, module_state),
        folder / CONFIG_FILE: lambda file: _write(file, config.to_json().encode()),
    }
    if unused:
        dead = unused
        writers[folder / UNUSED_FILE] = lambda file: write_safetensors(file, dead)
    write_files(writers)
    if not unused:
        try:
            (folder / UNUSED_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder / UNUSED_FILE} of an earlier save cannot be removed ({_reason(error)}); delete it"
            ) from error


def load_pretrained_files(dir: str | os.PathLike[str]) -> PretrainedFiles:
    """Read a folder that `save_pretrained` wrote.

    Returns:
        The configuration, the state dict (file-backed CPU tensors), and the dead weights, or None if they were not
        saved.

    Raises:
        CheckpointError: a file is missing, damaged, or written by a later version.
        ConfigError: `config.json` describes no model.
    """
    folder = Path(dir)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the folder that save_pretrained wrote")
    for name in (CONFIG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; give a folder that save_pretrained wrote")
    config = XFMConfig.load(folder / CONFIG_FILE)
    state = _read(folder / MODEL_FILE)
    unused = folder / UNUSED_FILE
    return PretrainedFiles(config, state, _read(unused) if unused.is_file() else None)


def write_files(writers: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Write several files so that each appears complete or not at all.

    Every writer fills a temporary file in the folder of its path, which is flushed to the disk; only when all have
    succeeded are they renamed into place. On any failure the temporary files are removed; a killed process may leave
    one behind, named `.<name>.<process>-<random>.tmp`.

    Raises:
        StorageError: a file cannot be written; names the path.
    """
    finished: dict[Path, Path] = {}
    replaced: list[str] = []
    current = Path()
    try:
        for current, writer in writers.items():
            temporary = current.with_name(f".{current.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            finished[temporary] = current
            with temporary.open("xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        for temporary, current in finished.items():
            os.replace(temporary, current)
            replaced.append(current.name)
        for folder in {path.parent for path in writers}:
            sync_folder(folder)
    except OSError as error:
        changed = f"{', '.join(replaced)} is already the new one" if replaced else "nothing there was changed"
        raise StorageError(
            f"{current} could not be written ({_reason(error)}); {changed}: free space or choose another folder, then "
            "save again"
        ) from error
    finally:
        for temporary in finished:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_bytes(contents: Mapping[Path, bytes | memoryview]) -> None:
    """`write_files` of contents that are in memory."""
    write_files({path: lambda file, content=content: _write(file, content) for path, content in contents.items()})


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Stream `tensors` in the safetensors format.

    The library's writer is not used because it wraps a full disk into an error without a number, cannot flush to the
    disk, and wants all tensors contiguous on the CPU at once.
    """
    # Wide types first keeps every tensor aligned to its own size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {
        "__metadata__": {"xfm_fast_format": str(FORMAT_VERSION), "xfm_fast": _package_version()}
    }
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{name!r} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors cannot hold; convert it to "
                "a dense floating-point tensor"
            )
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    _write(file, len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        _write(file, flat.view(torch.uint8).numpy().data)


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    file.write(data)


def _read(path: Path) -> dict[str, Tensor]:
    state = read_state_dict(path)
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get("xfm_fast_format", str(FORMAT_VERSION))
    if not written.isdigit() or int(written) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {written}, this version of xfm-fast reads up to {FORMAT_VERSION}; upgrade xfm-fast"
        )
    return state


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a rename survives a power cut only then."""
    # Not every system can open a folder.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _package_version() -> str:
    try:
        return version("xfm-fast")
    except PackageNotFoundError:
        return "unknown"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
