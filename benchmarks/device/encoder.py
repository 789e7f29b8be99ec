"""The vision encoder at both resolutions and four batches: as it is, as a graph, compiled, and in fp8 where offered."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.errors import XFMError
from xfm_fast.models.xfm import XFM

from .. import machine
from ..material.inputs import preset_config, random_state
from ..timing import one_line
from .journal import efficiency
from .worker import Context

_ROUNDS = 5
# Runs between two waits for the device: as many as take this long.
_BLOCK_S = 0.05
_COMPILED = ((224, 64), (224, 1))
"""Sizes at which `torch.compile` is tried: it takes half a minute for each."""


def measure(context: Context) -> None:
    """Rows of images a second, with the share of the data sheet's rate."""
    device = machine.choose_device(context.device)
    sizes, batches = ((32,), (1, 2)) if context.small else ((224, 384), (1, 8, 64, 256))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    models = {size: _model(size, device, dtype, small=context.small) for size in sizes}
    work = [(size, batch) for size in sizes for batch in batches]
    for size, batch in work:
        pixels = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        _row(context, models[size], "eager", pixels, lambda model, pixels: lambda: model.encode_image(pixels))
        _row(context, models[size], "CUDA graph", pixels, _graphed)
        _row(context, models[size], "fp8", pixels, _fp8)
    for size, batch in work:
        pixels = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        if context.small or (size, batch) not in _COMPILED:
            continue
        _row(context, models[size], "torch.compile", pixels, _compiled, least_s=40)


def _model(size: int, device: torch.device, dtype: torch.dtype, *, small: bool) -> XFM:
    config = preset_config("tiny" if small else "base").replace(image_size=size)
    with torch.device("meta"):
        model = XFM(config, heads=(), encoders=("vision",))
    state = random_state(XFMConfig.preset("tiny" if small else "base", image_size=size), (), 0)
    kept = {name: tensor.to(device, dtype) for name, tensor in state.items() if name in model.state_dict()}
    model.load_state_dict(kept, assign=True)
    return model.eval().requires_grad_(False)


def _graphed(model: XFM, pixels: Tensor) -> Callable[[], object]:
    from xfm_fast.graphs import Shapes, capture

    graphs = capture(model, Shapes(images=(pixels.shape[0],)))
    return lambda: graphs.encode_image(pixels)


def _compiled(model: XFM, pixels: Tensor) -> Callable[[], object]:
    compiled = torch.compile(model.encode_image, dynamic=False)
    return lambda: compiled(pixels)


def _fp8(model: XFM, pixels: Tensor) -> Callable[[], object]:
    from xfm_fast.kernels import ops

    choose: Any = getattr(ops, "use_fp8", None)
    if choose is None:
        raise XFMError("this version has no products in fp8")

    def run() -> object:
        with choose():
            return model.encode_image(pixels)

    return run


def _row(
    context: Context, model: XFM, contender: str, pixels: Tensor, make: Callable[[XFM, Tensor], Callable[[], object]],
    least_s: float = 2.0,
) -> None:  # fmt: skip
    batch, size = pixels.shape[0], pixels.shape[-1]
    name = f"vision encoder, {batch} image{'s' if batch > 1 else ''} of {size}"
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[pixels.dtype] if contender != "fp8" else "fp8"
    fields: dict[str, Any] = {"dtype": dtype, "unit": "images", "items": batch}
    fields["point"] = {"batch": batch, "image_size": size}
    if context.left < min(least_s, 2.0 if context.small else least_s):
        context.out_of_time("encoder", name, contender, **fields)
        return
    try:
        with torch.inference_mode(False), torch.no_grad():
            run = make(model, pixels)
            seconds, host = _timed(run, pixels.device)
    except XFMError as error:
        context.add("encoder", name, contender, status="absent", reason=str(error)[:300], **fields)
        return
    except Exception as error:  # of memory, of the compiler: the other variants go on
        context.add("encoder", name, contender, status="failed", reason=one_line(error), **fields)
        if pixels.is_cuda:
            torch.cuda.empty_cache()
        return
    sheet = machine.data_sheet(pixels.device)
    peak = None if sheet is None else sheet.flops_per_s * (2 if contender == "fp8" else 1)
    needed = flops.image_encoder(model.config, batch).total
    fields |= {"seconds": seconds, "host_s": host}
    fields["efficiency"] = efficiency(needed, None, statistics.median(seconds), peak)
    context.add("encoder", name, contender, **fields)


def _timed(run: Callable[[], object], device: torch.device) -> tuple[list[float], float | None]:
    """Seconds of a run with all that the host does, by blocks between two waits; and the host's own seconds."""

    def block(times: int) -> tuple[float, float]:
        begun = time.perf_counter()
        for _ in range(times):
            run()
        issued = time.perf_counter() - begun
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / times, issued / times

    for _ in range(3 if device.type == "cuda" else 1):
        block(1)
    times = max(1, round(_BLOCK_S / max(block(1)[0], 1e-6)))
    blocks = [block(times) for _ in range(_ROUNDS)]
    return [seconds for seconds, _ in blocks], (block(1)[1] if device.type == "cuda" else None)
