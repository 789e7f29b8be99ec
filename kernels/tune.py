"""Offline search of launch configurations on a GPU, written to `kernels/tuning/sm_<arch>.json` for `launch.config_for`.

Candidates come from a grid. The audit rejects configurations that spill, do not fit or do not compile; the others are
timed. The fastest candidate wins if all its shipped forms pass the audit. The audit's cache makes a second or resumed
search cheap.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import flash
from .audit.compiling import Form, Row, compile_rows
from .backend import _why_not
from .checks import FRAGMENT_TILE, Biased, Packed, RelPos
from .files import write_whole
from .triton import launch
from .triton.launch import TRITON_TYPE, KernelSpec, LaunchConfig
from .triton.relpos_table import FRAGMENT_HEAD_DIMS, takes_fragments

TUNING = Path(__file__).resolve().parent / "tuning"
# Timings vary by as much: a candidate has to be faster by more to replace the configuration in use.
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
    """Return the head dimensions that launch a kernel on the architecture; none for a kernel without tiles."""
    if spec.arches and arch not in spec.arches:
        return []
    # The narrow form replaces another one, and only as long as that has the tiles that it is made for.
    attention = all("head_dim" in variant for variant in spec.variants)
    if not attention or spec.name.endswith("_narrow"):
        return []
    if not {"BLOCK_M", "BLOCK_N"} <= spec.config(spec.variants[0], "bf16", 80).tiles.keys():
        return []
    compiled = {variant["head_dim"] for variant in spec.variants}
    if spec.name == "relpos_forward" and 90 <= arch < 100:
        compiled -= {*FRAGMENT_HEAD_DIMS}
    return [head_dim for head_dim in head_dims if head_dim in compiled]


def candidates(kernel: str) -> list[LaunchConfig]:
    """Return the grid of a kernel: tiles, warps and stages."""
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
    """Return whether a compilation may be shipped: it compiles, fits and does not spill."""
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
    """Find the best configuration of one kernel for a head dimension and dtype, and time flash-attn where it applies.

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
    rows = examine(forms[:1], configs)
    passed = [config for config, row in zip(configs, rows, strict=True) if acceptable(row)]
    run = workload(spec.name, size, dtype)
    seconds: list[float] = []
    for config in passed:
        with using(spec.name, size, dtype, arch, config):
            seconds.append(timer(run))

    def handicapped(index: int) -> float:
        return seconds[index] / (1 if passed[index] == in_use else 1 - MARGIN)

    for index in sorted(range(len(passed)), key=handicapped):
        if all(map(acceptable, examine(forms, [passed[index]]))):
            flash_run = flash_workload(spec.name, size, dtype)
            return Choice(
                kernel=spec.name,
                dtype=dtype,
                size=size,
                config=passed[index],
                seconds=seconds[index],
                before=seconds[passed.index(in_use)] if in_use in passed else float("inf"),
                rejected=len(configs) - len(passed),
                timed=len(passed),
                flash=None if flash_run is None else timer(flash_run),
            )
    raise ValueError(
        f"kernel {spec.name} at head_dim {size}: every configuration spills or does not fit"
    )


@contextmanager
def using(kernel: str, size: int, dtype: str, arch: int, config: LaunchConfig) -> Iterator[None]:
    """Launch the kernel with this configuration within the block, by an entry in the architecture's table."""
    rows = launch._tuned(arch).setdefault(kernel, {})
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
    """Merge choices into the architecture's table."""
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
        lines = []
        for key, entry in sorted(rows.items()):
            lines.append(f"  {json.dumps(key)}: {json.dumps(entry, ensure_ascii=False)}")
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    write_whole(path, ("{\n" + ",\n".join(kernels) + "\n}\n").encode())
    return path


def gpu_timer(call: Callable[[], Any]) -> float:
    """Return the median seconds of a call, with a cold second-level cache before each."""
    from triton.testing import do_bench

    milliseconds: Any = do_bench(call, warmup=25, rep=100, return_mode="median")
    return float(milliseconds) / 1e3


def model_workload(kernel: str, size: int, dtype: str, device: str = "cuda") -> Callable[[], Any]:
    """Return a call of the kernel at the model's shapes: 8 images of 384 pixels, 256 captions, or 3,328 tokens and an
    image.

    Backward kernels are timed within their whole backward pass. ValueError for a kernel without known shapes.
    """
    family, _, form = kernel.partition("_")
    if family not in ("varlen", "relpos", "bias"):
        raise ValueError(f"no shape is known at which to time kernel {kernel}")
    noise = _noise(dtype, device)
    if family == "varlen":
        forward, backward = _varlen_workload(noise, size, form)
    else:
        forward, backward = _image_workload(noise, size, biased=family == "bias")
    if "forward" in kernel:
        return forward
    out, lse = forward()
    return lambda: backward(out, lse)


_Workload = tuple[Callable[[], Any], Callable[[Tensor, Tensor], Any]]


def _varlen_workload(noise: Callable[..., Tensor], size: int, form: str) -> _Workload:
    from .triton.varlen_attention import varlen_attention_backward, varlen_attention_forward

    q, k, v, dout, packed = _packed(noise, size, form)
    return (
        lambda: varlen_attention_forward(q, k, v, packed),
        lambda out, lse: varlen_attention_backward(dout, q, k, v, out, lse, packed),
    )


def _image_workload(noise: Callable[..., Tensor], size: int, *, biased: bool) -> _Workload:
    from .triton import bias_attention, relpos_attention
    from .triton.relpos_table import materialise_bias

    heads, scale, window = 12, size**-0.5, (24, 24)
    tokens = 1 + window[0] * window[1]
    q, k, v, dout = (noise(8, tokens, heads, size) for _ in range(4))
    if biased:
        a = Biased(q, k, v, noise(1, heads, tokens, tokens), scale=scale)
        return (
            lambda: bias_attention.bias_attention_forward(a),
            lambda out, lse: bias_attention.bias_attention_backward(dout, None, a, out, lse),
        )
    table = noise((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads).float()
    fragments = takes_fragments(size, q.dtype, q.device)
    bias = materialise_bias(table, window, q.dtype, scale, fragments=fragments)
    turned = materialise_bias(table, window, q.dtype, scale, turned=True)
    args = RelPos(q, k, v, table, window, scale, turned=turned)
    return (
        lambda: relpos_attention.relpos_attention_forward(q, k, v, bias, scale),
        lambda out, lse: relpos_attention.relpos_attention_backward(dout, args, out, lse),
    )


def flash_workload(
    kernel: str, size: int, dtype: str, device: str = "cuda"
) -> Callable[[], Any] | None:
    """Return the work of `model_workload` by flash-attn, without a mask; None where it is missing or does not apply."""
    family, _, form = kernel.partition("_")
    backward = form in ("dkdv", "dkdv_short")
    applies = backward or form in ("forward", "forward_heads", "forward_heads_many")
    if family != "varlen" or not applies or _why_not("flash_attn", device, None) is not None:
        return None
    q, k, v, dout, packed = _packed(_noise(dtype, device), size, form)
    if not backward:
        return lambda: flash.varlen_attention(q, k, v, packed)
    leaves = tuple(t.requires_grad_() for t in (q, k, v))
    out = flash.varlen_attention(q, k, v, packed)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _noise(dtype: str, device: str) -> Callable[..., Tensor]:
    name = next(name for name, short in TRITON_TYPE.items() if short == dtype)
    generator = torch.Generator(device).manual_seed(0)
    torch_dtype = getattr(torch, name)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(torch_dtype)


def _packed(
    noise: Callable[..., Tensor], head_dim: int, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Packed]:
    """Return q, k, v, dout and packing of the sequences that a form is for."""
    if form.endswith(("_short", "_heads")):
        queries, keys = [13] * 256, [13] * 256
    elif form.endswith("_many"):
        queries, keys = [13] * 256, [577] * 256
    else:
        queries, keys = [3328], [577]
    q, dout = (noise(sum(queries), 12, head_dim) for _ in range(2))
    k, v = (noise(sum(keys), 12, head_dim) for _ in range(2))
    # The forward pass without dropout has a kernel of its own.
    drops, masked = "dropout" in form or form == "forward_short", "masked" in form
    device = q.device
    packed = Packed(
        cu_seqlens_q=_offsets(queries, device),
        cu_seqlens_k=_offsets(keys, device),
        max_q=max(queries),
        max_k=max(keys),
        scale=head_dim**-0.5,
        dropout_p=0.1 if drops else 0.0,
        seed=torch.zeros(1, dtype=torch.int64, device=device),
        key_mask=torch.ones(k.shape[0], dtype=torch.bool, device=device) if masked else None,
    )
    return q, k, v, dout, packed


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
