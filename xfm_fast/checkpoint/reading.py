"""Read a state dict from a file of unknown origin, without running anything that the file contains."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xfm_fast.errors import CheckpointError

# Where training programs keep the weights inside what they save, in the order in which they are looked for.
_NESTINGS = ("model", "module", "state_dict")
# Prefixes that DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")
_AGAIN = "download or copy it again and compare checksums"
_FOREIGN = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in `path`, a safetensors file or a PyTorch checkpoint (`.th`, `.pth`, `.pt`, `.bin`).

    The content decides the format, not the name. PyTorch checkpoints are read with `weights_only=True`, so a file that
    wants to run code is refused. Weights inside `{"model": ...}`, `{"module": ...}` or `{"state_dict": ...}` are
    unwrapped, and a `module.` prefix on every name is removed.

    Returns:
        Name to CPU tensor. The tensors are backed by the file where the format allows it, so memory is used only for
        what is read; keep the file in place while they live.

    Raises:
        CheckpointError: missing, empty, truncated, unsafe or foreign file, or one that holds something else.
    """
    path = Path(path)
    head = _first_bytes(path)
    kind = _kind(path, head)
    if kind != "safetensors":
        content = _load_torch(path, mmap=kind == "zip")
    else:
        try:
            content = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is a damaged or truncated safetensors file "
                f"({_first_line(error)}); {_AGAIN}"
            ) from None
    return _as_state_dict(content, path)


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, not a checkpoint file; name the file in it, or use from_pretrained for a folder that "
            "save_pretrained wrote"
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist; check the path") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror}); check its permissions") from None
    if not head:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes); {_AGAIN}")
    return head


def _kind(path: Path, head: bytes) -> str:
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            raise CheckpointError(f"{path} is {name}; give a .safetensors file or a PyTorch checkpoint")
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is a truncated PyTorch checkpoint: its end is missing; {_AGAIN}"
            )
        return "zip"
    # A safetensors file begins with the length of its JSON header. In text those eight bytes are a huge number.
    header = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32
    if header or (path.suffix == ".safetensors" and (len(head) < 9 or head[8:9] == b"{")):
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    text = head.lstrip()
    what = "an unknown kind of file"
    if text[:1] in (b"{", b"["):
        what = "a JSON file"
    elif text[:1] == b"<":
        what = "an HTML or XML page"
    elif all(byte >= 32 or byte in b"\t\n\r" for byte in text):
        what = "a text file"
    raise CheckpointError(
        f"{path} is {what} (it begins with {head[:8]!r}); give a .safetensors file or a PyTorch checkpoint"
    )


def _load_torch(path: Path, *, mmap: bool) -> Any:
    try:
        # Training programs like to store their command line next to the weights. Rebuilding a Namespace only fills
        # the attributes of a fresh object, so it is safe to allow.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(
                f"{path} asks for {refused[1]!r}, which is not plain weights; it was refused and nothing was run: "
                "re-save the file with torch.save(model.state_dict(), path) where you trust it"
            ) from None
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a PyTorch checkpoint, or is a damaged or truncated one "
            f"({_first_line(error)}); {_AGAIN}"
        ) from None


def _as_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    where = ""
    while isinstance(content, Mapping):
        inner = next((name for name in _NESTINGS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content, where = content[inner], f"{where}[{inner!r}]"
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}{where} holds a {type(content).__name__}; a mapping of names to tensors is needed: save "
            "model.state_dict()"
        )
    if not content:
        raise CheckpointError(f"{path}{where} holds no tensors; save model.state_dict()")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}{where} holds a {type(value).__name__} under {name!r} where a tensor is needed; save "
                "model.state_dict() alone or under 'model'"
            )
        state[name] = value.detach()
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
