"""Offline search of launch configurations on a GPU, written to `kernels/tuning/sm_<arch>.json` for `launch.config_for`.

Candidates come from a grid. The audit rejects configurations that spill, do not fit or do not compile; the rest are
timed. The fastest candidate wins if all its shipped forms pass the audit. The audit's cache makes a second or resumed
search cheap.
"""

# Parts of named tuples are passed on as positional arguments, whose number no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import flash
from .audit.compiling import Form, Row, compile_rows
from .backend import _why_not
from .checks import FRAGMENT_TILE, Biased, Packed, RelPos
from .files import write_whole
from .triton import launch
from .triton.launch import TRITON_TYPE, KernelSpec, LaunchConfig
from .triton.relpos_table import FRAGMENT_HEAD_DIMS, takes_fragments

TUNING = Path(__file__).resolve().parent / "tuning"
# What is slower by less than this may be the same: timings vary by as much. The configuration in use then stays.
MARGIN = 0.02
Timer = Callable[[Callable[[], Any]], float]
"""Seconds that a call takes."""

Workload = Callable[[str, int, str], Callable[[], Any]]
"""(kernel, head dimension, dtype) → a call that runs the kernel at one of the model's shapes."""


@dataclass(frozen=True)
class Choice:
    """The configuration for one kernel, dtype and head dimension."""

    kernel: str
    dtype: str
    size: int
    config: LaunchConfig
    seconds: float  # of the timed call
    before: float  # the same with the current configuration
    rejected: int  # candidates, by the audit
    timed: int
    flash: float | None = None  # seconds of flash-attn for the same work


def sizes(spec: KernelSpec, head_dims: Iterable[int], arch: int = 80) -> list[int]:
    """The head dimensions that launch a kernel on the architecture; empty for a kernel without tiles to choose."""
    if spec.arches and arch not in spec.arches:
        return []
    if spec.name == "relpos_forward" and 90 <= arch < 100:
        head_dims = [d for d in head_dims if d not in FRAGMENT_HEAD_DIMS]
    # This form stands in for another one, and only as long as that has the tiles that it is made for.
    attention = all("head_dim" in variant for variant in spec.variants) and not spec.name.endswith(
        "_narrow"
    )
    tiled = attention and set(spec.config(spec.variants[0], "bf16", 80).tiles) >= {
        "BLOCK_M",
        "BLOCK_N",
    }
    return [d for d in head_dims if any(v["head_dim"] == d for v in spec.variants)] if tiled else []


def candidates(kernel: str) -> list[LaunchConfig]:
    """The grid of a kernel: tiles, warps and stages."""
    if "_heads" in kernel:
        return [
            LaunchConfig({"HEADS": heads, "BLOCK_M": m, "BLOCK_N": n}, num_warps, num_stages)
            for heads, m, n, num_stages in itertools.product(
                (2, 4, 8), (16, 32), (16, 32, 64), (1, 2)
            )
            for num_warps in (heads // 2, heads)
        ]
    if kernel.endswith("_fragments"):
        block_m, block_n = FRAGMENT_TILE
        return [
            LaunchConfig(
                {"BLOCK_M": block_m, "BLOCK_N": block_n}, 8, num_stages, registers=registers
            )
            for num_stages, registers in itertools.product((1, 2, 3, 4), (0, 112, 126))
        ]
    short = kernel.endswith("_short")
    sizes, warps = ((16, 32, 64), (1, 2, 4)) if short else ((32, 64, 128), (4, 8))
    return [
        LaunchConfig({"BLOCK_M": m, "BLOCK_N": n}, num_warps, num_stages)
        for m, n, num_warps, num_stages in itertools.product(sizes, sizes, warps, (2, 3, 4))
    ]


def acceptable(row: Row) -> bool:
    """True for a compilation that may be shipped: it compiles, fits and does not spill."""
    return (
        not row.error
        and not row.stack_bytes
        and row.occupancy > 0
        and row.shared_bytes <= row.shared_limit
    )


def search(
    spec: KernelSpec,
    size: int,
    dtype: str,
    arch: int,
    *,
    timer: Timer | None = None,
    workload: Workload | None = None,
    grid: Iterable[LaunchConfig] | None = None,
) -> Choice:
    """The best configuration of one kernel for a head dimension and dtype, and the time of flash-attn where it applies.

    By default the GPU times `candidates` at the model's shapes; the current configuration is always included.
    ValueError for a head dimension without a form, or if no configuration is acceptable.
    """
    timer, workload = timer or gpu_timer, workload or model_workload
    forms = [variant for variant in spec.variants if variant["head_dim"] == size]
    if not forms:
        raise ValueError(f"kernel {spec.name} has no form for head_dim {size}")

    def examine(variants: list[Mapping[str, Any]], configs: list[LaunchConfig]) -> list[Row]:
        return compile_rows(
            [Form(spec, variant, arch, dtype, config) for config in configs for variant in variants]
        )

    in_use = spec.config(forms[0], dtype, arch)
    grid = [
        replace(c, apart=in_use.apart, fenced=in_use.fenced)
        for c in (candidates(spec.name) if grid is None else grid)
    ]
    configs = [in_use, *(c for c in grid if c != in_use)]
    good = [
        c for c, row in zip(configs, examine(forms[:1], configs), strict=True) if acceptable(row)
    ]
    run = workload(spec.name, size, dtype)
    times: list[tuple[float, int]] = []
    for number, config in enumerate(good):
        with using(spec.name, size, dtype, arch, config):
            times.append((timer(run), number))
    before = next((seconds for seconds, number in times if good[number] == in_use), float("inf"))
    ranked = sorted(
        (seconds if good[n] == in_use else seconds / (1 - MARGIN), n) for seconds, n in times
    )
    for _, number in ranked:
        if all(map(acceptable, examine(forms, [good[number]]))):
            seconds = next(s for s, n in times if n == number)
            rejected = len(configs) - len(good)
            theirs = flash_workload(spec.name, size, dtype)
            flash_seconds = None if theirs is None else timer(theirs)
            return Choice(
                spec.name,
                dtype,
                size,
                good[number],
                seconds,
                before,
                rejected,
                len(good),
                flash_seconds,
            )
    raise ValueError(
        f"kernel {spec.name} at head_dim {size}: every configuration spills or does not fit"
    )


@contextmanager
def using(kernel: str, size: int, dtype: str, arch: int, config: LaunchConfig) -> Iterator[None]:
    """Within the block, launches of the kernel take this configuration: it stands in the table that they read."""
    table = launch._tuned(arch)
    rows = table.setdefault(kernel, {})
    key = f"{dtype}/{size}"
    old = rows.get(key)
    rows[key] = _entry(config)
    launch.cached_options.cache_clear()
    try:
        yield
    finally:
        if old is None:
            del rows[key]
        else:
            rows[key] = old
        launch.cached_options.cache_clear()


def _entry(config: LaunchConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in asdict(config).items()
        if value or name in ("num_warps", "num_stages")
    }


def write(choices: Iterable[Choice], arch: int, gpu: str, folder: Path = TUNING) -> Path:
    """Enters choices into the architecture's table; rows that they do not concern stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm_{arch}.json"
    table: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for choice in choices:
        entry = _entry(choice.config) | {"measured": f"{choice.seconds * 1e6:.1f} µs, {gpu}"}
        if choice.flash is not None:
            entry["measured"] += f"; flash-attn {choice.flash * 1e6:.1f} µs"
            if choice.flash < choice.seconds * (1 - MARGIN):
                entry["backend"] = "flash_attn"
        table.setdefault(choice.kernel, {})[f"{choice.dtype}/{choice.size}"] = entry
    kernels = []
    for kernel, rows in sorted(table.items()):
        lines = ",\n".join(
            f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}"
            for k, v in sorted(rows.items())
        )
        kernels.append(f" {json.dumps(kernel)}: {{\n{lines}\n }}")
    write_whole(path, ("{\n" + ",\n".join(kernels) + "\n}\n").encode())
    return path


def gpu_timer(call: Callable[[], Any]) -> float:
    """Median seconds of a call, with a cold second-level cache before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=100, return_mode="median")) / 1e3


def model_workload(kernel: str, size: int, dtype: str, device: str = "cuda") -> Callable[[], Any]:
    """A call of the kernel at the model's shapes: 8 images of 384 pixels, 256 captions, or 3,328 tokens and an image.

    Backward kernels are timed within their whole backward pass. ValueError for a kernel without known shapes.
    """
    from .triton import bias_attention, relpos_attention, varlen_attention

    noise = _noise(dtype, device)
    family, _, part = kernel.partition("_")
    heads, scale, window = 12, size**-0.5, (24, 24)
    if family == "varlen":
        q, k, v, dout, packed = _packed(noise, size, part)
        forward = partial(varlen_attention.varlen_attention_forward, q, k, v, packed)
        backward = partial(varlen_attention.varlen_attention_backward, dout, q, k, v)
        last: tuple[Any, ...] = (packed,)
    elif family in ("relpos", "bias"):
        tokens, rows = 1 + window[0] * window[1], (2 * window[0] - 1) * (2 * window[1] - 1) + 3
        q, k, v, dout = (noise(8, tokens, heads, size) for _ in range(4))
        last = ()
        if family == "bias":
            biased = Biased(q, k, v, noise(1, heads, tokens, tokens), scale=scale)
            forward = partial(bias_attention.bias_attention_forward, biased)
            backward = partial(bias_attention.bias_attention_backward, dout, None, biased)
        else:
            table, fragments = noise(rows, heads).float(), takes_fragments(size, q.dtype, q.device)
            bias = relpos_attention.materialise_bias(
                table, window, q.dtype, scale, fragments=fragments
            )
            turned = relpos_attention.materialise_bias(table, window, q.dtype, scale, turned=True)
            forward = partial(relpos_attention.relpos_attention_forward, q, k, v, bias, scale)
            a = RelPos(q, k, v, table, window, scale, turned=turned)
            backward = partial(relpos_attention.relpos_attention_backward, dout, a)
    else:
        raise ValueError(f"no shape is known at which to time kernel {kernel}")
    if "forward" in kernel:
        return forward
    results = forward()
    return lambda: backward(*results, *last)


def flash_workload(
    kernel: str, size: int, dtype: str, device: str = "cuda"
) -> Callable[[], Any] | None:
    """The work of `model_workload` by flash-attn, without a mask; None where it is not installed or does not apply."""
    family, _, part = kernel.partition("_")
    backward = part in ("dkdv", "dkdv_short")
    if family != "varlen" or not (
        backward or part in ("forward", "forward_heads", "forward_heads_many")
    ):
        return None
    if _why_not("flash_attn", device, None) is not None:
        return None
    q, k, v, dout, packed = _packed(_noise(dtype, device), size, part)
    if not backward:
        return lambda: flash.varlen_attention(q, k, v, packed)
    leaves = tuple(t.requires_grad_() for t in (q, k, v))
    out = flash.varlen_attention(q, k, v, packed)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _noise(dtype: str, device: str) -> Callable[..., torch.Tensor]:
    kind = getattr(torch, next(name for name, short in TRITON_TYPE.items() if short == dtype))
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(kind)


def _packed(
    noise: Callable[..., torch.Tensor], head_dim: int, part: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Packed]:
    few, many = ([13] * 256, [13] * 256), ([13] * 256, [577] * 256)
    queries, keys = (
        few
        if part.endswith(("_short", "_heads"))
        else many
        if part.endswith("_many")
        else ([3328], [577])
    )
    heads, scale = 12, head_dim**-0.5
    q, dout = noise(sum(queries), heads, head_dim), noise(sum(queries), heads, head_dim)
    k, v = noise(sum(keys), heads, head_dim), noise(sum(keys), heads, head_dim)
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=q.device)
        for lengths in (queries, keys)
    )
    mask = torch.ones(k.shape[0], dtype=torch.bool, device=q.device) if "masked" in part else None
    seed = torch.zeros(1, dtype=torch.int64, device=q.device)
    # The forward pass without dropout has a kernel of its own.
    dropout = 0.1 if "dropout" in part or part == "forward_short" else 0.0
    return q, k, v, dout, Packed(cu_q, cu_k, max(queries), max(keys), scale, dropout, seed, mask)
