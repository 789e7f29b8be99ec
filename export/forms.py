"""Encoders of any library as graphs: a twin of the model whose layers are primitives that compilers fuse.

Every layer with a `LayerSpec` runs by a third executor of `replace.structure`, which plain PyTorch traces. The twin
shares the weights of the model, which stays as it is, accelerated or not.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.kernels import flags, reference
from xfm_fast.replace.acceleration import decide
from xfm_fast.replace.attention import (
    Attend,
    Dense,
    Padded,
    PositionTable,
    WindowAttention,
    register_attention,
)
from xfm_fast.replace.layer import FusedLayer
from xfm_fast.replace.official import OfficialTextLayer, OfficialVisionBlock
from xfm_fast.replace.report import in_graphs, unknown_layers
from xfm_fast.replace.structure import ATTENTION, LayerCall, apply_rotary
from xfm_fast.replace.swap import (
    Fused,
    Settings,
    original_class,
    restore,
    swap,
)

from .graphs import Graph
from .layers import MASKED, JoinedAttention, additive_mask, attention
from .manifest import AXES, LIBRARY_OUTPUTS, LONGEST_ROW, TensorRecord, tensor_axes
from .request import GraphName

# Operations in plain PyTorch.
_SETTINGS = Settings(kernels="reference")
_JOINED = "joined_attention"


@dataclass
class ExportCall(LayerCall):
    """Executor of an exported layer: joined projections, moved biases, attention of primitives."""

    joined: Any = None  # a `JoinedAttention`

    def attention(self, x: Tensor) -> Tensor:
        norm = self.modules.inner_norms[ATTENTION]
        windows: Any = getattr(self.attend, "windows", None)
        x = x if windows is None else windows.split(x)
        is_plain, bias = self._added_to_scores(x)
        moves = is_plain and self.rotary is None and norm is None
        q, k, v = self.joined.project(x, biased=not moves)
        if moves:
            self.modules = self.modules._replace(proj=self.joined.output)
        if self.rotary is not None:
            q, k = (apply_rotary(t.transpose(1, 2), self.rotary).transpose(1, 2) for t in (q, k))
        if not is_plain:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            context = self.attend(q, k, v, 0.0, self.settings)
        else:
            if windows is not None:
                q, k, v = (t.unflatten(0, (-1, windows.count)) for t in (q, k, v))
            scale = getattr(self.attend, "scale", None)
            context = attention(q, k, v, bias, "primitives", scale)
            context = context if windows is None else context.flatten(0, 1)
            context = context.transpose(1, 2).flatten(2)
        context = context if windows is None else windows.merge(context)
        return context if norm is None else norm(context)

    def _added_to_scores(self, x: Tensor) -> tuple[bool, Tensor | None]:
        """Return whether the attention is a softmax of scores and a bias, and the bias."""
        attend: Any = self.attend
        if isinstance(attend, WindowAttention) and attend.logit_scale is None:
            return True, self.joined.constant(attend.bias)
        if not isinstance(attend, Padded | Dense):
            return False, None
        mask, bias = attend.mask, getattr(attend, "bias", None)
        if isinstance(bias, PositionTable):
            bias = self.joined.constant(partial(reference.position_bias, *bias))[None]
        elif bias is not None and bias.ndim == 2:
            bias = bias[None, None]
        if attend.causal:
            mask = x.new_full((1, 1, x.shape[1], x.shape[1]), MASKED).triu(1)
        terms = [additive_mask(term, x.dtype) for term in (bias, mask) if term is not None]
        return True, sum(terms[1:], terms[0]) if terms else None


class ExportedLayer(FusedLayer):
    """A layer of a twin; nothing in it changes between the swap and the trace."""

    def intact(self) -> bool:
        return True

    def executor(self, attend: Attend, settings: Settings, rotary: Any) -> LayerCall:
        modules = self.layer_spec.modules(self)
        return ExportCall(modules, attend, settings, rotary=rotary, joined=self._modules[_JOINED])


class ExportedTextLayer(ExportedLayer, OfficialTextLayer):
    """`OfficialTextLayer` in export form."""


class ExportedVisionBlock(ExportedLayer, OfficialVisionBlock):
    """`OfficialVisionBlock` in export form."""


_FORMS = (ExportedLayer, ExportedTextLayer, ExportedVisionBlock)


@dataclass
class ExportForm:
    """A model to trace, and which of its layers are in export form."""

    model: Any  # a twin in evaluation mode, of the same classes and weights
    replaced: Counter[str] = field(default_factory=Counter)  # layers by class
    declined: dict[str, str] = field(default_factory=dict)  # why others are not, by class


def export_form(model: nn.Module) -> ExportForm:
    """Make a twin of a model for exporters: it shares weights, and layers with a `LayerSpec` are in export form."""
    # New parameters of the same memory: flags of 8-bit weights, which the twin drops, are attributes of a parameter.
    parameters = {
        id(value): nn.Parameter(value.detach(), requires_grad=False)
        for value in model.parameters()
        if type(value) is nn.Parameter
    }
    twin: Any = copy.deepcopy(model, parameters).eval()
    if in_graphs(twin):
        del twin.__dict__["forward"]
    for module in twin.modules():
        if isinstance(module, Fused):
            restore(module)
        elif type(module).__name__ == "SpladePooling":
            module.forward = MethodType(_pool_sparse, module)
    form = ExportForm(twin)
    modules = dict(twin.named_modules())
    reported: set[nn.Module] = set()
    layers = []
    for path, module in modules.items():
        entry, exported = decide(path, module, _SETTINGS, _FORMS)
        if entry is None:
            continue
        reported.update(module.modules())
        layers.append(path)
        reason = entry.reason
        if exported is not None and not _join(module, exported):
            reason = "it has adapters that cannot be merged"
        if reason is None:
            form.replaced[entry.class_name] += 1
        else:
            form.declined[entry.class_name] = reason
    for layer in unknown_layers(twin, modules, reported, layers):
        form.declined[layer.class_name] = "it has no LayerSpec"
    for module in twin.modules() if form.replaced else ():
        # Padding masks `[B, N]` reach the layers then.
        if hasattr(module, "set_attn_implementation") and module._can_set_attn_implementation():
            module.set_attn_implementation(register_attention())
    return form


def _pool_sparse(pooling: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute `SpladePooling` without its loop over chunks of a length that varies."""
    logits = features["token_embeddings"] * features["attention_mask"].unsqueeze(-1)
    scores = logits.relu().log1p()
    if pooling.activation_function == "log1p_relu":
        scores = scores.log1p()
    pooled = scores.amax(1) if pooling.pooling_strategy == "max" else scores.sum(1)
    return {**features, "sentence_embedding": pooled}


@torch.no_grad()
def _join(layer: nn.Module, exported: type[Fused]) -> bool:
    """Put a layer into export form; returns False if its adapters run apart from its linear layers."""
    spec = exported.adapted(original_class(layer))["layer_spec"]
    modules = spec.modules(layer)
    affines: list[Any] = [modules.qkv]
    if modules.qkv is None:
        affines = [
            _SETTINGS.affine_of(linear, *linear.parameters()) for linear in modules.projections
        ]
    proj = _SETTINGS.affine_of(modules.proj, *modules.proj.parameters())
    if proj is None or None in affines:
        return False
    weights, biases = map(list, zip(*affines, strict=True))
    biases = [*(modules.qkv_biases or biases)]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = flags.concatenate_biases(biases, [len(weight) // len(biases)] * len(biases))
    layer.add_module(_JOINED, JoinedAttention(weight, bias, proj, modules.heads))
    swap(layer, exported, _SETTINGS)
    return True


_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
# Results of sentence-transformers and transformers, and their names as outputs of a graph.
_OUTPUTS = LIBRARY_OUTPUTS | {
    name: name for name in ("last_hidden_state", "pooler_output", "logits")
}


class EncoderGraph(Graph):
    """A model of sentence-transformers, or a module that takes its inputs by name, in export form.

    Args:
        model: The model, which stays as it is.
        examples: Inputs by name; dimensions that are no axis have one size.
        modality: Modality of the inputs of a model of sentence-transformers.
    """

    def __init__(
        self, model: nn.Module, examples: Mapping[str, Tensor], modality: str | None = None
    ) -> None:
        super().__init__()
        self.form, self.modality = export_form(model), modality
        self.model = self.form.model
        self.limits = {"length": _longest(self.model)}
        self.inputs = [_record(name, value, AXES) for name, value in examples.items()]
        self.gathered = len(self.inputs)
        with torch.no_grad():
            results = self.run(examples)
        self.outputs = [_record(name, value, self.axes) for name, value in results.items()]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model and return its results by the names of outputs."""
        if self.modality is None:
            results = self.model(**tensors)
        else:
            results = self.model({**tensors, "modality": self.modality})
        if isinstance(results, Tensor):
            results = {"logits": results}
        # The tokens of a sparse encoder are as wide as its vocabulary.
        sparse = hasattr(self.model, "max_active_dims")
        return {
            output: results[name]
            for name, output in _OUTPUTS.items()
            if name in results and not (sparse and output == "last_hidden_state")
        }

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = self.run({t.name: value for t, value in zip(self.inputs, tensors, strict=True)})
        dtype = next(self.parameters()).dtype
        return tuple(results[tensor.name].to(dtype) for tensor in self.outputs)


def encoder_graphs(model: Any) -> dict[GraphName, EncoderGraph]:
    """Return the graphs of a model of sentence-transformers: `encoder`, and that of the images of two towers."""
    from PIL import Image

    pairs = hasattr(model, "predict")
    samples: dict[str, Any] = {
        "text": ("a text", "another") if pairs else "a text",
        "image": Image.new("RGB", (64, 64)),
    }
    names: list[GraphName] = ["encoder", "image_encoder"]
    graphs: dict[GraphName, EncoderGraph] = {}
    for modality, sample in samples.items():
        if modality not in model.modalities:
            continue
        features = model.preprocess([sample, sample])
        examples = {name: features[name] for name in _INPUTS if name in features}
        graphs[names[len(graphs)]] = EncoderGraph(model, examples, modality)
    return graphs


def _record(name: str, value: Tensor, axes: Collection[str]) -> TensorRecord:
    """Describe a tensor of which only the dimensions in `axes` vary."""
    sizes = zip(tensor_axes(name, value.ndim), value.shape, strict=True)
    dims = [axis if axis in axes else size for axis, size in sizes]
    dtype = "float32" if value.is_floating_point() else "int64"
    return TensorRecord(name=name, dtype=dtype, dims=dims)  # pyright: ignore[reportArgumentType]


def _longest(model: nn.Module) -> int:
    """Return the number of tokens that a model has positions for, or its own limit."""
    limits = [getattr(model, "max_seq_length", None) or LONGEST_ROW]
    for name, module in model.named_modules():
        of_texts = "position_embedding" in name and "vision" not in name
        if of_texts and isinstance(module, nn.Embedding):
            # RoBERTa counts from behind the padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    return min(limits)
