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
_MAX_LISTED = 6


@dataclass
class _Checkpoint:
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
    """Convert an official or X²-VLM file, or one of our folders, to a folder for `XFM.from_pretrained`.

    `config` gives the sizes of an official checkpoint (its image size is read from the position
    tables, and all sizes of X²-VLM from its weights); position tables are interpolated to
    `image_size`. `keep_unused` stores dead weights in a file of their own, so that the conversion can
    be reversed exactly. The folder gets `tokenizer`, or that of the source. Returns the lines of a
    report. Raises `CheckpointError` if the source cannot be read or does not fit, `StorageError` if
    the destination cannot be written; both leave the destination unchanged.
    """
    if destination.is_file() or destination.suffix in SUFFIXES:
        raise InputError(f"destination {destination} is a file name; name a folder")
    loaded = _read(source, config, image_size)
    vocabulary = None
    if tokenizer is not None:
        vocabulary = read_tokenizer(tokenizer, loaded.config)
    elif source.is_dir():
        vocabulary = find_tokenizer(source, loaded.config)
    files = XFMProcessor(loaded.config, vocabulary).files()
    unused = loaded.unused if keep_unused else None
    checkpoint.save_pretrained(loaded.state, loaded.config, destination, unused=unused, files=files)
    if loaded.unused and not keep_unused:
        loaded.report.append(f"dropped: {_join_names(list(loaded.unused))}")
    size = loaded.config.image_size
    loaded.report.append(f"wrote {destination}: {_describe(loaded.state)} at {size} pixels")
    return loaded.report


def to_official_file(
    source: Path, destination: Path, *, image_size: int | None = None, keep_unused: bool = True
) -> list[str]:
    """Convert one of our folders to an official `.th`, `.pth` or `.safetensors` file.

    Position tables are interpolated to `image_size`; `keep_unused` includes the dead weights, if the
    folder has them. Returns the lines of a report, and raises as `to_xfm_folder`.
    """
    if destination.suffix not in SUFFIXES or destination.is_dir():
        raise InputError(
            f"destination {destination} must be a file that ends in one of {', '.join(SUFFIXES)}"
        )
    if not source.is_dir():
        raise InputError(
            f"source {source} is not an xfm-fast folder; name a folder as the destination"
        )
    loaded = _read(source, None, image_size)
    # Only the pretraining class wraps its language encoder into one with a masked-language head.
    naming = "pretraining" if "mlm" in checkpoint.heads_in(loaded.state) else "fine-tuning"
    unused = loaded.unused if keep_unused else None
    state = checkpoint.to_official(loaded.state, loaded.config, unused=unused, naming=naming)
    missing = checkpoint.underivable([our_name(name) for name in state], loaded.config)
    if missing:
        loaded.report.append(f"dead weights omitted: {_join_names(missing)}")

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
    size = loaded.config.image_size
    loaded.report.append(
        f"wrote {destination}: {_describe(state)} in {naming} naming at {size} pixels"
    )
    return loaded.report


def _read(source: Path, config: XFMConfig | None, image_size: int | None) -> _Checkpoint:
    if not source.is_dir():
        assert config is not None
        loaded = _read_official(source, config, image_size)
    else:
        files = checkpoint.load_pretrained_files(source)
        loaded = _Checkpoint(files.config, dict(files.state), files.unused)
        if image_size is not None:
            loaded.config = files.config.resized(image_size)
            changed: dict[str, tuple[int, int]] = {}
            for name, value in files.state.items():
                if name.endswith(TABLE):
                    loaded.state[name] = fit_table(name, value, loaded.config.grid, changed)
            loaded.report += _describe_interpolation(changed)
    _check(loaded, source)
    return loaded


def _read_official(source: Path, config: XFMConfig, image_size: int | None) -> _Checkpoint:
    official = checkpoint.read_state_dict(source)
    relative = checkpoint.relative_of(official)
    if relative is not None:
        config, state, changes = checkpoint.read_x2vlm(
            official, what=f"checkpoint {source}", image_size=image_size
        )
        naming, dropped, unused = relative, "video weights dropped", None
    else:
        config = checkpoint.config_of(official, config, image_size)
        state, changes = checkpoint.to_ours(official, config)
        naming, dropped = f"{changes.naming} naming", "dead weights"
        unused = changes.unused or None
    report = [
        f"read {source}: {naming}, {_describe(official)}",
        *_describe_interpolation(changes.interpolated),
    ]
    if changes.renamed:
        old, new = next(iter(changes.renamed.items()))
        report.append(f"renamed: {len(changes.renamed)}, for example {old} to {new}")
    for title, names in (
        ("tied duplicates dropped", changes.duplicates),
        ("index buffers dropped", changes.buffers),
        (dropped, changes.unused),
    ):
        if names:
            report.append(f"{title}: {_join_names([*names])}")
    return _Checkpoint(config, state, unused, report)


def _check(loaded: _Checkpoint, source: Path) -> None:
    """Check that the state is a complete X-FM model; a task head is allowed."""
    names = list(loaded.state)
    encoders: list[Encoder] = [
        encoder
        for encoder in ALL_ENCODERS
        if any(name.startswith(_ENCODERS[encoder]) for name in names)
    ]
    if not encoders:
        raise CheckpointError(
            f"{source} has no X-FM encoder (first entry: {next(iter(names), None)}); give an X-FM checkpoint"
        )
    heads = checkpoint.heads_in(names)
    if "contrastive" in heads:
        loaded.config = loaded.config.replace(learnable_temperature="temp" in loaded.state)
    title = f"checkpoint {source}"
    checkpoint.require_depth(loaded.config, loaded.state, what=title)
    with checkpoint.without_values():
        model = XFM(loaded.config, heads=heads, encoders=encoders)
    model_names = model.state_dict().keys()
    prefixes = tuple(_ENCODERS.values())
    task = [name for name in names if name not in model_names and not name.startswith(prefixes)]
    checkpoint.compare(model, loaded.state, what=title, surplus=task, finite=True)
    if task:
        loaded.report.append(f"task head copied: {_join_names(task)}")


def _describe_interpolation(changed: Mapping[str, tuple[int, int]]) -> list[str]:
    if not changed:
        return []
    before, after = next(iter(changed.values()))
    return [
        f"interpolated: {len(changed)} position tables from {before}x{before} to {after}x{after} patches"
    ]


def _describe(state: Mapping[str, Tensor]) -> str:
    values = sum(tensor.numel() for tensor in state.values())
    return f"{len(state)} tensors, {values / 1e6:,.1f}M values"


def _join_names(names: list[str]) -> str:
    joined = ", ".join(names[:_MAX_LISTED])
    if len(names) > _MAX_LISTED:
        joined += f" and {len(names) - _MAX_LISTED} more"
    return joined
