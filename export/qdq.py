"""8-bit GEMMs in an ONNX graph: calibration samples, scales, and QDQ nodes.

A GEMM here is a `MatMul` by a constant matrix; those of attention have two activations and keep their dtype. All GEMMs
of one tensor form a `Site`, quantised as a whole by `QuantizeLinear` and `DequantizeLinear` pairs, which ONNX Runtime,
OpenVINO and both TensorRT read.

Scales are fitted by trial on samples of the tensor. Large channels are first scaled down, and the weights that multiply
them up (SmoothQuant, arXiv 2211.10438): free where a LayerNorm feeds only these GEMMs.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .consumers import LARGEST_FILE
from .request import Quantisation
from .runtimes.onnx_sessions import session_options

_CALIBRATION_ROWS = 512
"""Sample rows of every tensor."""

_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Clipping thresholds as shares of the largest entry, tried in turn."""

_SMOOTHINGS = (0.25, 0.5, 0.75)
"""SmoothQuant exponents, tried in turn."""

# Without a LayerNorm to fold into, smoothing costs a pass over the tensor, so it must reduce the error this much.
_WORTH_A_PASS = 0.5

_EXTREMES: dict[Quantisation, float] = {"int8": 127.0, "fp8": 448.0}


@dataclass(frozen=True)
class Scheme:
    """The 8-bit type; `unsigned` activations have a zero point (fast on CPUs, unsupported on GPUs)."""

    kind: Quantisation
    unsigned: bool = False


@dataclass(frozen=True)
class Site:
    """A tensor and the GEMMs that read it; `norm` is the LayerNormalization that feeds only these, or ""."""

    tensor: str
    products: tuple[str, ...]  # names of the nodes
    layers: tuple[str, ...]  # names of their layers
    weights: tuple[Tensor, ...]  # [K, N] in fp32, each
    norm: str = ""


@dataclass
class Seen:
    """Statistics of a site's tensor over the calibration."""

    largest: Tensor  # [K] maximum magnitude of every channel
    low: float = 0.0
    high: float = 0.0
    samples: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.samples)


@dataclass(frozen=True)
class Fitted:
    """A site with its scales."""

    site: Site
    smoothing: Tensor | None  # [K] divides the tensor and multiplies the weights
    scale: float
    zero: int
    error: float  # of the GEMMs on the samples, relative to their norm


def sites(model: Any) -> list[Site]:
    """The sites of a graph, without heads (cheap, decisive for scores) and concatenated tensors (OpenVINO 2026.4)."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    made_by: dict[str, Any] = {}
    returned = {value.name for value in graph.output}
    products: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        for name in node.output:
            made_by[name] = node
        if node.op_type == "MatMul" and node.input[1] in constants and len(constants[node.input[1]].dims) == 2:
            products.setdefault(node.input[0], []).append(node)

    def label(product: Any) -> str:
        """The layer by the name of its bias; transposed weights lost their names."""
        for reader in readers.get(product.output[0], ()):
            for name in reader.input:
                if reader.op_type == "Add" and name in constants and name.endswith(".bias"):
                    return name.removesuffix(".bias")
        return product.name

    def norm(tensor: str) -> str:
        made = made_by.get(tensor)
        if made is None or made.op_type != "LayerNormalization" or tensor in returned:
            return ""
        folds = len(readers[tensor]) == len(products[tensor]) and all(name in constants for name in made.input[1:])
        return made.name if folds else ""

    found = []
    for tensor, nodes in products.items():
        if tensor in made_by and made_by[tensor].op_type == "Concat":
            continue
        layers = tuple(label(node) for node in nodes)
        if not any("_head." in layer for layer in layers):
            weights = tuple(_array(constants[node.input[1]]) for node in nodes)
            found.append(Site(tensor, tuple(node.name for node in nodes), layers, weights, norm(tensor)))
    return found


def _array(tensor: Any) -> Tensor:
    from onnx import numpy_helper

    # torch.from_numpy does not take NumPy's extension types, such as bfloat16.
    return torch.from_numpy(np.array(numpy_helper.to_array(tensor), np.float32))


def real_tokens(feed: Mapping[str, np.ndarray]) -> Tensor | None:
    """Mask of the real tokens of a feed, flattened; None for graphs without texts."""
    hidden = next((feed[name] for name in ("attention_mask", "segments") if name in feed), None)
    return None if hidden is None else torch.from_numpy(hidden).bool().flatten()


def observe(
    model: Any, found: Sequence[Site], feeds: Sequence[Mapping[str, np.ndarray]]
) -> tuple[dict[str, Seen], list[dict[str, np.ndarray]]]:
    """Run an fp32 graph on feeds; returns statistics of the sites' tensors (padding excluded) and all outputs."""
    import onnx

    model = copy.deepcopy(model)
    outputs = [value.name for value in model.graph.output]
    tensors = [site.tensor for site in found]
    given = {value.name for value in model.graph.input}
    watched = [name for name in tensors if name not in given and name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in watched)
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, Seen] = {}
    results = []
    each = math.ceil(_CALIBRATION_ROWS / max(len(feeds), 1))
    run = runner(model)
    for feed in feeds:
        values = run(feed, [*outputs, *watched])
        results.append({name: values[name] for name in outputs})
        real = real_tokens(feed)
        for name in tensors:
            value = torch.from_numpy(np.asarray(feed[name] if name in given else values[name])).float().flatten(0, -2)
            if real is not None and len(real) == len(value):
                value = value[real]
            known = seen.setdefault(name, Seen(torch.zeros(value.shape[1])))
            known.largest = known.largest.maximum(value.abs().amax(0))
            known.low, known.high = min(known.low, float(value.min())), max(known.high, float(value.max()))
            known.samples.append(value[torch.randperm(len(value), generator=generator)[:each]].clone())
    return seen, results


def runner(model: Any) -> Callable[..., dict[str, np.ndarray]]:
    """A function from inputs (and output names) to outputs: ONNX Runtime on the CPU."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        # Models beyond two gigabytes must be files.
        path = Path(scratch, "graph.onnx")
        save(model, path)
        session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])

    def run(feed: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        names = [output.name for output in session.get_outputs()] if names is None else names
        found: Any = session.run([*names], dict(feed))
        return dict(zip(names, found, strict=True))

    return run


def fit(site: Site, seen: Seen, scheme: Scheme) -> Fitted:
    """The scales of a site with the smallest error of its GEMMs on the samples."""
    rows, weights = seen.rows, torch.cat(site.weights, 1)
    exact = rows @ weights
    length = float(exact.norm()) or 1.0

    def tried(smoothing: Tensor | None, clip: float) -> Fitted:
        given, changed = (rows, weights) if smoothing is None else (rows / smoothing, weights * smoothing[:, None])
        if smoothing is None:
            low, high = seen.low, seen.high
        else:
            high = float((seen.largest / smoothing).max())
            low = max(-high, float(given.min()) * 1.1)
        scale, zero = _scale(low * clip, high * clip, scheme)
        found = _round_activations(given, scale, zero, scheme) @ torch.cat(
            [_quantise_weight(part, scheme)[0] for part in changed.split([w.shape[1] for w in site.weights], 1)], 1
        )
        return Fitted(site, smoothing, scale, zero, float((found - exact).norm()) / length)

    best = plain = tried(None, 1.0)
    heaviest = weights.abs().amax(1).clamp(min=1e-8)
    largest = seen.largest.clamp(min=1e-8)
    for power in _SMOOTHINGS:
        smoothing = largest**power / heaviest ** (1 - power)
        # An unused channel keeps its scale.
        smoothing = torch.where(seen.largest > 0, smoothing / smoothing.log().mean().exp(), 1.0).clamp(1e-3, 1e3)
        best = min(best, tried(smoothing, 1.0), key=lambda each: each.error)
    if not site.norm and best.error > _WORTH_A_PASS * plain.error:
        best = plain
    return min((tried(best.smoothing, clip) for clip in _CLIPS), key=lambda each: each.error)


def _scale(low: float, high: float, scheme: Scheme) -> tuple[float, int]:
    if scheme.unsigned:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        return scale, min(max(round(-low / scale), 0), 255)
    return max(-low, high) / _EXTREMES[scheme.kind] or 1.0, 0


def _round_activations(x: Tensor, scale: float, zero: int, scheme: Scheme) -> Tensor:
    """Activations rounded to the scheme's grid."""
    if scheme.kind == "fp8":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    least, most = (0, 255) if scheme.unsigned else (-128, 127)
    return ((x / scale).round() + zero).clamp(least, most).sub(zero) * scale


def _quantise_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """A weight `[K, N]` in 8 bits: its rounded values, the stored tensor, and scales `[N]` or `[]`."""
    extreme = _EXTREMES[scheme.kind]
    if scheme.kind == "fp8":
        scale = (weight.abs().max() / extreme).clamp(min=1e-12)
        stored = (weight / scale).clamp(-extreme, extreme).to(torch.float8_e4m3fn)
        return stored.float() * scale, stored.view(torch.uint8), scale
    scale = (weight.abs().amax(0) / extreme).clamp(min=1e-12)
    stored = (weight / scale).round().clamp(-127, 127)
    return stored * scale, stored.to(torch.int8), scale


def quantise_graph(model: Any, chosen: Iterable[Fitted], scheme: Scheme) -> Any:
    """A copy of an ONNX graph with some of its sites in 8 bits."""
    return _Rewriting(copy.deepcopy(model), scheme).run([*chosen])


class _Rewriting:
    """One graph that is being rewritten."""

    def __init__(self, model: Any, scheme: Scheme) -> None:
        self.model, self.graph, self.scheme = model, model.graph, scheme
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.nodes = {node.name: node for node in self.graph.node}

    def run(self, chosen: Sequence[Fitted]) -> Any:
        before: dict[str, list[Any]] = {}
        for fitted in chosen:
            before.setdefault(fitted.site.products[0], []).extend(self._site(fitted))
        order = []
        for node in self.graph.node:
            order += [*before.get(node.name, ()), node]
        del self.graph.node[:]
        self.graph.node.extend(order)
        read = {name for node in order for name in node.input} | {value.name for value in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        return self.model

    def _site(self, fitted: Fitted) -> Iterator[Any]:
        from onnx import TensorProto, helper

        site, name = fitted.site, f"{fitted.site.tensor}.{self.scheme.kind}"
        # Scales have the dtype of the graph.
        wide = self.constants[self.nodes[site.products[0]].input[1]].data_type
        stored = TensorProto.FLOAT8E4M3FN if self.scheme.kind == "fp8" else TensorProto.INT8
        given = site.tensor
        if fitted.smoothing is not None and site.norm:
            norm = self.nodes[site.norm]
            for place in range(1, len(norm.input)):
                value = _array(self.constants[norm.input[place]])
                norm.input[place] = self._add(f"{name}.norm_{place}", value / fitted.smoothing, wide)
        elif fitted.smoothing is not None:
            factor = self._add(f"{name}.smoothing", 1 / fitted.smoothing, wide)
            given = f"{name}.smooth"
            yield helper.make_node("Mul", [site.tensor, factor], [given], f"{name}.smoothing")
        scale = self._add(f"{name}.scale", torch.tensor(fitted.scale), wide)
        kind = TensorProto.UINT8 if self.scheme.unsigned else stored
        zero = self._add(f"{name}.zero", torch.tensor(fitted.zero, dtype=torch.uint8), kind)
        yield helper.make_node("QuantizeLinear", [given, scale, zero], [f"{name}.q"], f"{name}.quantize")
        yield helper.make_node("DequantizeLinear", [f"{name}.q", scale, zero], [f"{name}.dq"], f"{name}.dequantize")
        for product, weight in zip(site.products, site.weights, strict=True):
            changed = weight if fitted.smoothing is None else weight * fitted.smoothing[:, None]
            _, values, scales = _quantise_weight(changed, self.scheme)
            parts = [
                self._add(f"{product}.weight", values, stored),
                self._add(f"{product}.weight_scale", scales, wide),
                self._add(f"{product}.weight_zero", torch.zeros(scales.shape, dtype=torch.uint8), stored),
            ]
            axis: dict[str, Any] = {"axis": 1} if scales.dim() else {}
            yield helper.make_node(
                "DequantizeLinear", parts, [f"{product}.weight_dq"], f"{product}.weight_dequantize", **axis
            )
            node = self.nodes[product]
            node.input[0], node.input[1] = f"{name}.dq", f"{product}.weight_dq"

    def _add(self, name: str, value: Tensor, kind: int) -> str:
        from onnx import TensorProto, helper

        types: dict[int, torch.dtype] = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}
        types[TensorProto.BFLOAT16] = torch.bfloat16
        stored = value.to(types.get(kind, value.dtype)).contiguous()
        content = stored.reshape(-1).view(torch.uint8).numpy().tobytes()
        self.graph.initializer.append(helper.make_tensor(name, kind, [*value.shape], content, raw=True))
        return name


def save(model: Any, path: Path, *, largest_file: int = LARGEST_FILE) -> list[str]:
    """Write a graph, weights beyond `largest_file` bytes to a separate file."""
    import onnx

    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > largest_file
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)
    onnx.save(model, str(path), save_as_external_data=external, location=beside.name, size_threshold=1024)
    return [path.name, *([beside.name] if external else [])]
