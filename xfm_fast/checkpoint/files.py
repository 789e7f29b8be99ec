"""State dicts in files: reading that executes none of their content, and streamed writing."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, StorageError
from xfm_fast.io import make_folder, require_file, write_files

StateDict = Mapping[str, Tensor]

FORMAT_VERSION = 1
CONFIG_FILE, MODEL_FILE, UNUSED_FILE = "config.json", "model.safetensors", "unused.safetensors"
TASK_FILE = "task.json"
"""Next to fine-tuned weights or their export: their task."""
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "README.md"
_CARD = """---
library_name: xfm-fast
tags: [x-fm, image-text-retrieval, vision-language]
---

An X-FM ([arXiv 2301.05065](https://arxiv.org/abs/2301.05065)) for images of {size} × {size} pixels.

```python
from xfm_fast import {imported}

model = {load}("{name}")
```
"""
_USE = """
It embeds texts and images with sentence-transformers:

```python
import xfm_fast  # makes X-FM known to transformers
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
images = model.encode(["photo.jpg"])
print(model.similarity(images, model.encode(["a dog on a beach", "a red bicycle"])))
```
"""
# The module of sentence-transformers that reads the folder.
_MODULE = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.base.modules.transformer.Transformer",
}

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
# Keys of the weights in checkpoints of training programs, in order of precedence.
_NESTINGS = ("model", "module", "state_dict")
_MAX_NESTINGS = 8
# Prefixes of DistributedDataParallel and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
_REMEDY = "download or copy it again and compare checksums"
_FOREIGN = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
)


def model_folder(path: Path) -> Path | None:
    """Return the weights folder of a path: the path itself, or the best or last one of a run; None for other paths."""
    for folder in (path, path / "best", path / "model"):
        # os.path, unlike pathlib, returns False for a name that is too long.
        if os.path.isfile(folder / CONFIG_FILE):
            return folder
    return None


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file or a PyTorch checkpoint (`.th`, `.pth`, `.pt`, `.bin`) as name → CPU
    tensor.

    The content decides the format, not the name. PyTorch checkpoints are read with
    `weights_only=True`, which refuses code. `{"model": ...}`, `{"module": ...}` and `{"state_dict":
    ...}` are unwrapped, and a `module.` prefix is removed. Tensors are memory-mapped where the
    format allows it: keep the file in place while they live. Raises `CheckpointError`.
    """
    path = Path(path)
    file_format = _detect_format(path)
    if file_format == "zip":
        _check_zip(path)
    if file_format != "safetensors":
        return _as_state_dict(_load_torch(path, mmap=file_format == "zip"), path)
    try:
        return _as_state_dict(load_file(path), path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is a damaged or truncated safetensors file "
            f"({_first_line(error)}); {_REMEDY}"
        ) from None


def _detect_format(path: Path) -> Literal["safetensors", "zip", "pickle"]:
    """Detect the format of a checkpoint by its first bytes."""
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; name the checkpoint file in it, or use from_pretrained"
        )
    try:
        with require_file(path).open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist; check the path") from None
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error.strerror}); check its permissions"
        ) from None
    if not head:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes); {_REMEDY}")
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            raise CheckpointError(
                f"{path} is {name}; give a .safetensors file or a PyTorch checkpoint"
            )
    if head.startswith(b"PK\x03\x04"):
        if not _is_complete_zip(path):
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is a truncated PyTorch checkpoint; {_REMEDY}"
            )
        return "zip"
    # A safetensors file begins with the length of its JSON header; eight bytes of text would be a
    # huge length.
    header = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32
    if header or (path.suffix == ".safetensors" and (len(head) < 9 or head[8:9] == b"{")):
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    text = head.lstrip()
    description = "an unknown file"
    if text[:1] in (b"{", b"["):
        description = "a JSON file"
    elif text[:1] == b"<":
        description = "an HTML or XML page"
    elif all(byte >= 32 or byte in b"\t\n\r" for byte in text):
        description = "a text file"
    raise CheckpointError(
        f"{path} is {description} (it begins with {head[:8]!r}); give a .safetensors file or a PyTorch checkpoint"
    )


def _is_complete_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        # A multi-disk archive; reading it finds other faults.
        return True


def _check_zip(path: Path) -> None:
    """Verify the archive's checksums, which PyTorch does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            for entry in archive.infolist():
                # PyTorch does not compress, and a compressed file may expand to any size.
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                    raise CheckpointError(
                        f"{path} has a compressed {entry.filename}, unlike torch.save; save it again if you trust it"
                    )
                with archive.open(entry) as file:
                    while file.read(1 << 22):
                        pass
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is a damaged or truncated PyTorch checkpoint "
            f"({_first_line(error)}); {_REMEDY}"
        ) from None


def _load_torch(path: Path, *, mmap: bool) -> Any:
    try:
        # Training programs store their command line next to the weights; a Namespace only gets
        # attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise CheckpointError(
            f"{path} needs more memory than this machine has; {_REMEDY}"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code and isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path} contains {code[1]!r}, not only weights, and was not run; save model.state_dict() again"
            ) from None
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a PyTorch checkpoint "
            f"({_first_line(error)}); {_REMEDY}"
        ) from None


def _as_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    where = ""
    # A mapping may contain itself.
    while isinstance(content, Mapping) and where.count("[") < _MAX_NESTINGS:
        inner = next((name for name in _NESTINGS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content, where = content[inner], f"{where}[{inner!r}]"
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}{where} is a {type(content).__name__}, not a mapping to tensors; save model.state_dict()"
        )
    if not content:
        raise CheckpointError(f"{path}{where} has no tensors; save model.state_dict()")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}{where} has a {type(value).__name__} under {name!r}, not a tensor; save model.state_dict() only"
            )
        if value.is_nested or value.dtype not in _DTYPES:
            description = "nested" if value.is_nested else value.dtype
            raise CheckpointError(
                f"{name!r} in {path}{where} is {description}, unlike any model here; convert it to float32"
            )
        if value.layout == torch.strided and not value.is_meta:
            stored = value.untyped_storage().nbytes()
            if value.nbytes > stored:
                raise CheckpointError(
                    f"{name!r} in {path}{where} expands {stored:,} bytes to {list(value.shape)}; "
                    "save it with .contiguous()"
                )
        state[name] = value.detach()
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


class PretrainedFiles(NamedTuple):
    """The content of a folder written by `save_pretrained`."""

    config: XFMConfig
    state: dict[str, Tensor]
    unused: dict[str, Tensor] | None


def save_pretrained(
    module_state: StateDict,
    config: XFMConfig,
    dir: str | os.PathLike[str],
    *,
    unused: StateDict | None = None,
    files: Mapping[str, bytes] | None = None,
    name: str | None = None,
) -> None:
    """Write `config.json`, `model.safetensors`, `unused.safetensors` (with `unused`) and other
    `files` to `dir`.

    With `files` come a card, which calls the model `name` and replaces none, and the module that
    sentence-transformers reads.

    All files are complete on disk under temporary names before the first rename, so that a full
    disk or a killed process leaves an earlier save intact. `unused.safetensors` of an earlier save
    is removed, since it belongs to other weights. Tensors are streamed without a second copy of the
    model. Raises `StorageError`, or `CheckpointError` for a dtype that safetensors cannot hold.
    """
    folder = Path(dir)
    make_folder(folder)
    writers: dict[Path, Callable[[BinaryIO], object]] = {
        folder / MODEL_FILE: lambda file: write_safetensors(file, module_state),
        folder / CONFIG_FILE: lambda file: file.write(config.to_json().encode()),
    }
    if unused:
        writers[folder / UNUSED_FILE] = lambda file: write_safetensors(file, unused)
    if files is not None:
        embeds = "vision_proj.weight" in module_state
        files = {**_presentation(config, embeds, files, name or folder.resolve().name), **files}
    for file_name, content in (files or {}).items():
        if file_name != CARD_FILE or not (folder / CARD_FILE).exists():
            writers[folder / file_name] = lambda file, content=content: file.write(content)
    write_files(writers)
    if not unused:
        try:
            (folder / UNUSED_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder / UNUSED_FILE} of an earlier save cannot be removed ({error.strerror or error}); delete it"
            ) from error


def _presentation(
    config: XFMConfig, embeds: bool, files: Collection[str], name: str
) -> dict[str, bytes]:
    """Return the card, and for sentence-transformers the methods that embed the modalities."""
    load = "load" if TASK_FILE in files else "XFM.from_pretrained"
    card = _CARD.format(
        size=config.image_size,
        imported=load.partition(".")[0],
        load=load,
        name=name,
    )
    if not embeds:
        return {CARD_FILE: card.encode()}
    modalities = ("text", "image") if TOKENIZER_FILE in files else ("image",)
    methods = {
        modality: {"method": f"get_{modality}_features", "method_output_name": "pooler_output"}
        for modality in modalities
    }
    settings = {"modality_config": methods, "module_output_name": "sentence_embedding"}
    return {
        CARD_FILE: (card + _USE.format(name=name)).encode(),
        "modules.json": json.dumps([_MODULE], indent=2).encode(),
        "sentence_bert_config.json": json.dumps(settings, indent=2).encode(),
    }


def load_pretrained_files(dir: str | os.PathLike[str]) -> PretrainedFiles:
    """Read a folder written by `save_pretrained`: configuration, memory-mapped state dict, and dead
    weights or None.

    Raises `CheckpointError` for a missing, damaged or newer file, `ConfigError` for an invalid
    `config.json`.
    """
    folder = Path(dir)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give one written by save_pretrained")
    for name in (CONFIG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}; give a folder written by save_pretrained"
            )
    config = XFMConfig.load(folder / CONFIG_FILE)
    state = _read(folder / MODEL_FILE)
    unused = folder / UNUSED_FILE
    return PretrainedFiles(config, state, _read(unused) if unused.is_file() else None)


def write_safetensors(file: BinaryIO, tensors: StateDict) -> None:
    """Stream `tensors` in the safetensors format.

    The library's own writer hides the errno of a full disk, does not flush, and needs all tensors
    contiguous on the CPU.
    """
    # Wide dtypes first, so that every tensor is aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    package = "unknown"
    with suppress(PackageNotFoundError):
        package = version("xfm-fast")
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "xfm_fast_format": str(FORMAT_VERSION),
            "xfm_fast": package,
        }
    }
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.is_meta:
            raise CheckpointError(
                f"{name!r} is on the meta device, without values; load the weights first"
            )
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{name!r} is {tensor.layout} of {tensor.dtype}, which safetensors cannot store; convert it"
            )
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def _read(path: Path) -> dict[str, Tensor]:
    state = read_state_dict(path)
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get("xfm_fast_format", str(FORMAT_VERSION))
    if not re.fullmatch(r"\d{1,9}", written, re.ASCII) or int(written) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {written}; this xfm-fast reads up to {FORMAT_VERSION}: upgrade xfm-fast"
        )
    return state
