"""Convert checkpoints between the official format and ours, file to file, with a report of the changes."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from xfm_fast import checkpoint
from xfm_fast.checkpoint.names import TABLE, fit_table, our_name
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, InputError
from xfm_fast.io import write_files
from xfm_fast.models.processor import XFMProcessor, find_tokenizer, read_tokenizer
from xfm_fast.models.xfm import ALL_ENCODERS, XFM, Encoder

SUFFIXES = (".safetensors", ".th", ".pth", ".pt", ".bin")
_ENCODERS: dict[Encoder, str] = {name: f"{name}_encoder." for name in ALL_ENCODERS}
_LISTED = 6


@dataclass
class _Source:
    config: XFMConfig
    state: dict[str, Tensor]
    unused: dict[str, Tensor] | None
    report: list[str] = field(default_factory=list)


def to_xfm_folder(
    source: Path,
    destination: Path,
    config: XFMConfig,
    *,
    image_size: int | None = None,
    keep_unused: bool = True,
    tokenizer: Path | None = None,
) -> list[str]:
    """Convert an official, X²-VLM or CCLM-X²-VLM file, or one of our folders, to a folder for `XFM.from_pretrained`.

    `config` gives the sizes of an official checkpoint (its image size is read from the position tables, and all sizes
    of X²-VLM from its weights); position tables are interpolated to `image_size`. `keep_unused` stores dead weights in
    a file of their own, so that the way back is exact. The folder gets `tokenizer`, or that of
    the source. Returns the lines of a report. Raises `CheckpointError` if the
    source cannot be read or does not fit, `StorageError` if the destination cannot be written; both leave the
    destination unchanged.
    """
    if destination.is_file() or destination.suffix in SUFFIXES:
        raise InputError(f"destination {destination} is a file name; name a folder")
    found = _read(source, config, image_size)
    unused = found.unused if keep_unused else None
    if tokenizer is None:
        vocabulary = find_tokenizer(source, found.config) if source.is_dir() else None
    else:
        vocabulary = read_tokenizer(tokenizer, found.config)
    files = XFMProcessor(found.config, vocabulary).files()
    checkpoint.save_pretrained(found.state, found.config, destination, unused=unused, files=files)
    if found.unused and not keep_unused:
        found.report.append(f"dropped: {_join_names(list(found.unused))}")
    found.report.append(
        f"wrote {destination}: {_describe(found.state)} at {found.config.image_size} pixels"
    )
    return found.report


def to_official_file(
    source: Path, destination: Path, *, image_size: int | None = None, keep_unused: bool = True
) -> list[str]:
    """Convert one of our folders to an official `.th`, `.pth` or `.safetensors` file; returns the lines of a report.

    Position tables are interpolated to `image_size`; `keep_unused` includes the dead weights, if the folder has them.
    Raises as `to_xfm_folder`.
    """
    if destination.suffix not in SUFFIXES or destination.is_dir():
        raise InputError(
            f"destination {destination} must be a file that ends in one of {', '.join(SUFFIXES)}"
        )
    if not source.is_dir():
        raise InputError(
            f"source {source} is not an xfm-fast folder; name a folder as the destination"
        )
    found = _read(source, None, image_size)
    # Only the pretraining class wraps its language encoder into one with a masked-language head.
    naming = "pretraining" if "mlm" in checkpoint.heads_in(found.state) else "fine-tuning"
    unused = found.unused if keep_unused else None
    state = checkpoint.to_official(found.state, found.config, unused=unused, naming=naming)
    lacking = checkpoint.underivable([our_name(name) for name in state], found.config)
    if lacking:
        found.report.append(f"dead weights omitted: {_join_names(lacking)}")

    def write(file: BinaryIO) -> None:
        if destination.suffix == ".safetensors":
            # The format has no aliases: tied tensors are written twice.
            file.write(save({name: tensor.clone() for name, tensor in state.items()}))
            return
        try:
            torch.save({"model": dict(state)}, file)
        except RuntimeError as error:  # how PyTorch reports a full disk
            raise OSError(errno.EIO, str(error).splitlines()[0]) from error

    write_files({destination: write})
    size = found.config.image_size
    found.report.append(
        f"wrote {destination}: {_describe(state)} in {naming} naming at {size} pixels"
    )
    return found.report


def _read(source: Path, config: XFMConfig | None, image_size: int | None) -> _Source:
    if source.is_dir():
        files = checkpoint.load_pretrained_files(source)
        found = _Source(files.config, dict(files.state), files.unused)
        if image_size is not None:
            found.config = files.config.resized(image_size)
            changed: dict[str, tuple[int, int]] = {}
            for name, value in files.state.items():
                if name.endswith(TABLE):
                    found.state[name] = fit_table(name, value, found.config.grid, changed)
            found.report += _interpolation(changed)
    else:
        assert config is not None
        found = _from_official(source, config, image_size)
    _check(found, source)
    return found


def _from_official(source: Path, config: XFMConfig, image_size: int | None) -> _Source:
    official = checkpoint.read_state_dict(source)
    if (relative := checkpoint.relative_of(official)) is not None:
        config, state, changes = checkpoint.read_x2vlm(
            official, what=f"checkpoint {source}", image_size=image_size
        )
        naming, dropped = relative, "video weights dropped"
    else:
        config = checkpoint.config_of(official, config, image_size)
        state, changes = checkpoint.to_ours(official, config)
        naming, dropped = f"{changes.naming} naming", "dead weights"
    report = [
        f"read {source}: {naming}, {_describe(official)}",
        *_interpolation(changes.interpolated),
    ]
    if changes.renamed:
        old, new = next(iter(changes.renamed.items()))
        report.append(f"renamed: {len(changes.renamed)}, for example {old} to {new}")
    for what, names in (
        ("tied duplicates dropped", changes.duplicates),
        ("index buffers dropped", changes.buffers),
        (dropped, changes.unused),
    ):
        if names:
            report.append(f"{what}: {_join_names([*names])}")
    return _Source(config, state, (changes.unused or None) if relative is None else None, report)


def _check(found: _Source, source: Path) -> None:
    """Refuse an incomplete X-FM model; a task head is allowed."""
    names = list(found.state)
    encoders: list[Encoder] = [
        name for name in ALL_ENCODERS if any(key.startswith(_ENCODERS[name]) for key in names)
    ]
    if not encoders:
        raise CheckpointError(
            f"{source} has no X-FM encoder (first entry: {next(iter(names), None)}); give an X-FM checkpoint"
        )
    heads = checkpoint.heads_in(names)
    config = found.config
    if "contrastive" in heads:
        config = config.replace(learnable_temperature="temp" in found.state)
    checkpoint.require_depth(config, found.state, what=f"checkpoint {source}")
    with checkpoint.without_values():
        model = XFM(config, heads=heads, encoders=encoders)
    known = tuple(model.state_dict())
    task = [
        name
        for name in names
        if name not in known and not name.startswith(tuple(_ENCODERS.values()))
    ]
    checkpoint.compare(model, found.state, what=f"checkpoint {source}", surplus=task, finite=True)
    found.config = config
    if task:
        found.report.append(f"task head copied: {_join_names(task)}")


def _interpolation(changed: Mapping[str, tuple[int, int]]) -> list[str]:
    if not changed:
        return []
    before, after = next(iter(changed.values()))
    return [
        f"interpolated: {len(changed)} position tables from {before}x{before} to {after}x{after} patches"
    ]


def _describe(state: Mapping[str, Tensor]) -> str:
    return f"{len(state)} tensors, {sum(tensor.numel() for tensor in state.values()) / 1e6:,.1f}M values"


def _join_names(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
