"""The exported graphs: the model cut into modules that a server composes, in shapes that compilers handle well.

`vision`, `text`, `image_memory` and `fusion` let a server reuse work: an image is encoded and projected once, and every
further caption costs the fusion encoder only. `match` is the whole model from pixels and ids to a score.

A fine-tuned model has further graphs: heads are outputs of the graph that computes their input, `PAIR_GRAPH` is the
fusion encoder over a pair of images with its head, `decoder_memory` projects the decoder's states once, and
`decoder_step` writes one token of every text.

The graphs share the modules of the model, with their attention written for compilers; texts are padded instead of
packed, because the number of packed tokens depends on values. Padding is masked with a finite value, so that a row
without any real token stays finite.

Packed `text` and `fusion` take captions side by side in rows of one length; a block mask keeps captions separate, and
only the ends of rows are padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels import ops
from xfm_fast.models.frozen import is_frozen
from xfm_fast.models.text import LayerStack
from xfm_fast.models.vision import Block
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.models import TaskModel

from .layers import (
    Heads,
    JoinedLinears,
    M,
    Patches,
    PositionAttention,
    SelfAttention,
    additive_mask,
    attention,
    block_mask,
    class_head,
    cross_attention,
    split_heads,
    with_children,
)
from .manifest import LONGEST_ROW, TensorRecord
from .request import ALL_GRAPHS, DEFAULT_GRAPHS, GRAPHS, PAIR_GRAPH, AttentionForm, DType, GraphName

DTYPES: dict[DType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class Graph(nn.Module):
    """A module of the model with named inputs and outputs, in the order of `forward`'s arguments and results."""

    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    gathered: int
    """Number of the last inputs that are the tuple `*memory` of `forward`."""
    limits: dict[str, int]
    """Greatest sizes of axes that the model bounds."""

    def describe(
        self,
        model: XFM,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *optional: str,
        **sizes: int,
    ) -> None:
        """Set inputs and outputs by name; `optional` are the bracketed dimensions that this graph has."""
        config = model.config
        sizes = {
            "side": config.image_size,
            "image_tokens": config.num_image_tokens,
            "vision_width": config.vision_width,
            "width": config.text_width,
            "heads": config.text_heads,
            "size": config.text_width // config.text_heads,
            "embed": config.embed_dim,
            "vocabulary": config.vocab_size,
            "labels": getattr(model, "labels", 0),
            "pair": 2,
            **sizes,
        }
        self.inputs = [TensorRecord.of(name, optional, sizes) for name in inputs]
        self.outputs = [TensorRecord.of(name, optional, sizes) for name in outputs]
        self.gathered = sum(name.startswith(("memory_", "decoder_")) for name in inputs)
        self.limits = dict.fromkeys(("length", "past"), config.max_text_length)
        if "rows" in self.axes:
            # Positions restart with every caption.
            self.limits["length"] = max(config.max_text_length, LONGEST_ROW)

    def relevant(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Select the sizes of axes that this graph has."""
        return {axis: size for axis, size in sizes.items() if axis in self.axes}

    @property
    def axes(self) -> list[str]:
        """The axes of all inputs that vary, without repeats."""
        dims = (dim for tensor in self.inputs for dim in tensor.dims)
        return [*dict.fromkeys(dim for dim in dims if isinstance(dim, str))]


class VisionGraph(Graph):
    """Pixels to image embeddings and the contrastive feature: the model's encoder."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        encoder = model.vision_encoder
        blocks = [block for block in encoder.blocks if isinstance(block, Block)]
        self.encoder = with_children(
            encoder,
            patch_embed=Patches(encoder.patch_embed.proj),
            blocks=nn.ModuleList(
                with_children(block, attn=PositionAttention(block.attn, form)) for block in blocks
            ),
        )
        self.heads = Heads(
            image_feature=model.vision_proj if "contrastive" in model.heads else None,
            class_logits=class_head(model, "image"),
        )
        self.reads_mean = getattr(model, "head", None) == "official_image"
        self.describe(model, ["pixels"], ["image_embeds", *self.heads])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """`[B, 3, R, R]` → `[B, 1 + N, vision_width]`, `[B, embed_dim]`, `[B, classes]`."""
        encoder = self.encoder
        x = encoder.embed(pixels)
        for block in encoder.blocks:
            x = block(x)
        norm = encoder.fc_norm
        if encoder.config.local_attn_depth > 0:
            x = ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        else:
            # Without the class token, which the mean of the patches replaces: TensorRT fuses this into the last GEMM.
            x = ops.layer_norm(x[:, 1:], norm.weight, norm.bias, norm.eps)
            x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        first = x[:, 0]
        if self.reads_mean:
            first = torch.cat([first, x[:, 1:].mean(1)], dim=-1)
        return (x, *self.heads(first))


class TextGraph(Graph):
    """Token ids to text embeddings and the contrastive feature; padded positions hold arbitrary values."""

    def __init__(self, model: XFM, form: AttentionForm, *, packed: bool = False) -> None:
        super().__init__()
        self.encoder = model.text_encoder.roberta
        self.attentions = nn.ModuleList(map(SelfAttention, self.encoder.encoder))
        self.heads = Heads(
            text_feature=model.text_proj if "contrastive" in model.heads else None,
            class_logits=class_head(model, "text"),
        )
        if packed:
            inputs, output = ["packed_ids", "positions", "segments", "firsts"], "packed_embeds"
        else:
            inputs, output = ["input_ids", "attention_mask"], "text_embeds"
        self.describe(model, inputs, [output, *self.heads])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """`[B, L]` ids and mask → `[B, L, text_width]`, `[B, embed_dim]`, `[B, classes]`."""
        mask = additive_mask(attention_mask, self.encoder.embeddings.LayerNorm.weight.dtype)
        x = self.encode(input_ids, self.encoder.embeddings.position_ids(input_ids), mask)
        return (x, *self.heads(x[:, 0]))

    def encode(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Encode `[R, L]` ids and positions under an additive attention mask → `[R, L, text_width]`."""
        x = self.encoder.embeddings(ids, positions)
        for attend, layer in zip(self.attentions, self.encoder.encoder, strict=True):
            x = layer.feed_forward(attend(x, mask))
        return x


class PackedTextGraph(TextGraph):
    """The text graph on packed rows."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__(model, form, packed=True)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a graph is called by the names of its inputs
        self, packed_ids: Tensor, positions: Tensor, segments: Tensor, firsts: Tensor
    ) -> tuple[Tensor, ...]:
        """R rows of L tokens with B captions → `[R, L, text_width]`, `[B, embed_dim]`, `[B, classes]`."""
        mask = block_mask(segments, segments, self.encoder.embeddings.LayerNorm.weight.dtype)
        x = self.encode(packed_ids, positions, mask)
        indices = firsts[:, 0] * packed_ids.shape[1] + firsts[:, 1]
        return (x, *self.heads(x.flatten(0, 1).index_select(0, indices)))


class _MemoryGraph(Graph):
    """States to the keys and values of every layer, as separate tensors so that the reading graph copies none."""

    def __init__(self, stack: LayerStack) -> None:
        super().__init__()
        # Only the projections: the file then holds only their weights.
        attentions = [layer.crossattention.self for layer in stack]
        self.heads = attentions[0].heads
        linears = [linear for branch in attentions for linear in (branch.key, branch.value)]
        self.parts = nn.ModuleList(linears)
        self.projections = JoinedLinears(*linears)

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, M, width]` → keys and values of layer 0, of layer 1, ...: `[B, H, M, D]` each."""
        projected = self.projections(states).unflatten(-1, (len(self.parts), self.heads, -1))
        return tuple(
            projected[:, :, index].transpose(1, 2).contiguous() for index in range(len(self.parts))
        )


class ImageMemoryGraph(_MemoryGraph):
    """Image embeddings to the keys and values of every fusion layer."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__(model.fusion_encoder.roberta.encoder)
        self.describe(model, ["image_embeds"], memory_names(model.config.fusion_layers))


class FusionGraph(Graph):
    """T captions on each of B memories to fused embeddings and head outputs; captions form one long query sequence."""

    def __init__(
        self,
        model: XFM,
        form: AttentionForm,
        *,
        all_tokens: bool = False,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.stack, self.all_tokens = model.fusion_encoder.roberta.encoder, all_tokens
        self.form: AttentionForm = form
        last = self.stack[len(self.stack) - 1]
        self.attentions = nn.ModuleList(
            SelfAttention(layer, first_only=layer is last and not all_tokens)
            for layer in self.stack
        )
        self.heads = Heads(
            match_logits=model.itm_head if "matching" in model.heads else None,
            boxes=model.bbox_head if "boxes" in model.heads else None,
            class_logits=class_head(model, "pair"),
        )
        if packed:
            inputs, optional = ["packed_embeds", "segments", "firsts"], ["texts", "batch"]
        else:
            inputs, optional = ["text_embeds", "attention_mask"], ["texts"]
        outputs = ["fused", *self.heads]
        if all_tokens and packed:
            outputs.append("fused_tokens")
        elif all_tokens:
            optional.append("length")
        memory = memory_names(model.config.fusion_layers)
        self.describe(model, [*inputs, *memory], outputs, *optional)

    def forward(
        self, text_embeds: Tensor, attention_mask: Tensor, *memory: Tensor
    ) -> tuple[Tensor, ...]:
        """`[B, T, L, width]`, `[B, T, L]`, keys and values `[B, H, M, D]` of every layer → token 0 (or all), heads."""
        batch, texts, length, width = text_embeds.shape
        mask = additive_mask(attention_mask.reshape(batch * texts, length), text_embeds.dtype)
        x = self.layers(text_embeds.reshape(batch * texts, length, width), mask, memory)
        if not self.all_tokens:
            fused = x.reshape(batch, texts, width)
            return (fused, *self.heads(fused))
        fused = x.reshape(batch, texts, length, width)
        return (fused, *self.heads(fused[:, :, 0]))

    def layers(
        self,
        x: Tensor,
        mask: Tensor,
        memory: Sequence[Tensor],
        *,
        self_attended: bool = False,
        last: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Encode `[P, L, width]`.

        `self_attended`: the input has the self-attention of layer 0. `last` returns tokens, mask and queries of the
        last layer; by default it attends from token 0, or from all tokens with `all_tokens`.
        """
        for index, (attend, layer) in enumerate(zip(self.attentions, self.stack, strict=True)):
            if last is not None and index == len(self.stack) - 1:
                x = attend(*last(x))
            elif index or not self_attended:
                x = attend(x, mask)
            pair = memory[2 * index : 2 * index + 2]
            x = layer.feed_forward(cross_attention(layer, x, pair, None, self.form))
        return x


class PackedFusionGraph(FusionGraph):
    """The fusion graph on packed rows, R rows on each of B memories."""

    def __init__(self, model: XFM, form: AttentionForm, *, all_tokens: bool = False) -> None:
        super().__init__(model, form, all_tokens=all_tokens, packed=True)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a graph is called by the names of its inputs
        self, packed_embeds: Tensor, segments: Tensor, firsts: Tensor, *memory: Tensor
    ) -> tuple[Tensor, ...]:
        """R rows of L tokens with T captions on each of B memories → token 0 `[B, T, width]`, heads, all tokens."""
        batch, rows, length, width = packed_embeds.shape
        texts, tokens = firsts.shape[1], rows * length
        x, captions = packed_embeds.flatten(0, 1), segments.flatten(0, 1)
        indices = firsts[..., 0] * length + firsts[..., 1]
        indices = (indices + torch.arange(batch, device=indices.device)[:, None] * tokens).flatten()

        def first_tokens(x: Tensor) -> Tensor:
            x = x.reshape(batch * tokens, width)
            return x.index_select(0, indices).reshape(batch, texts, width)

        def last(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # All rows of an image form one sequence, because rows differ in their number of captions.
            keys, queries = segments.reshape(batch, tokens), segments.flatten()
            queries = queries.index_select(0, indices).reshape(batch, texts)
            mask = block_mask(queries, keys, x.dtype)
            return x.reshape(batch, tokens, width), mask, first_tokens(x)

        mask = block_mask(captions, captions, x.dtype)
        x = self.layers(x, mask, memory, last=None if self.all_tokens else last)
        if not self.all_tokens:
            return (x, *self.heads(x))
        first = first_tokens(x)
        return (first, *self.heads(first), x.reshape(batch, rows, length, width))


class MatchGraph(Graph):
    """Pixels and ids to match scores: the whole model in one file."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        self.vision, self.text = VisionGraph(model, form), TextGraph(model, form)
        self.memory, self.fusion = ImageMemoryGraph(model, form), FusionGraph(model, form)
        self.describe(model, ["pixels", "input_ids", "attention_mask"], ["scores"], "texts")

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """`[B, 3, R, R]`, `[B, T, L]` ids and mask → `[B, T]`: the logit of "text describes image"."""
        memory = self.memory(self.vision(pixels)[0])
        batch, texts, length = input_ids.shape
        rows = (batch * texts, length)
        embeds = self.text(input_ids.reshape(rows), attention_mask.reshape(rows))[0]
        fused = self.fusion(embeds.reshape(batch, texts, length, -1), attention_mask, *memory)
        return (fused[1][..., 1],)


class PairGraph(Graph):
    """A sentence fused with each of two images, and the head on both: logits of "false" and "true"."""

    def __init__(self, model: Any, form: AttentionForm) -> None:
        super().__init__()
        self.fusion, self.class_head = FusionGraph(model, form), model.cls_head
        inputs = ["text_embeds", "attention_mask", *memory_names(model.config.fusion_layers)]
        self.describe(model, inputs, ["class_logits"], "pair", labels=2)

    def forward(
        self, text_embeds: Tensor, attention_mask: Tensor, *memory: Tensor
    ) -> tuple[Tensor]:
        """`[B, L, width]`, `[B, L]`, keys and values `[B, 2, H, M, D]` of both images, layer by layer → `[B, 2]`."""
        mask = additive_mask(attention_mask, text_embeds.dtype)
        # The self-attention of layer 0 reads no image and is computed once for both.
        x = self.fusion.attentions[0](text_embeds, mask)
        x, mask = x.repeat_interleave(2, dim=0), mask.repeat_interleave(2, dim=0)
        pairs = [layer.flatten(0, 1) for layer in memory]
        first = self.fusion.layers(x, mask, pairs, self_attended=True)
        return (self.class_head(first.reshape(text_embeds.shape[0], -1)),)


class DecoderMemoryGraph(_MemoryGraph):
    """The states that a decoder reads to the keys and values of its layers."""

    def __init__(self, model: Any, form: AttentionForm) -> None:
        super().__init__(model.text_decoder.roberta.encoder)
        names = memory_names(len(model.text_decoder.roberta.encoder), "decoder")
        self.describe(model, ["states"], names, **_state_sizes(model))


class DecoderStepGraph(Graph):
    """One more token of T texts for each of B states; before the first token the past is one masked token."""

    def __init__(self, model: Any, form: AttentionForm) -> None:
        super().__init__()
        self.decoder, self.heads = model.text_decoder, model.config.text_heads
        stack = self.decoder.roberta.encoder
        branches = [layer.attention.self for layer in stack]
        self.linears = nn.ModuleList(
            JoinedLinears(branch.query, branch.key, branch.value) for branch in branches
        )
        inputs = ["token_ids", "past", "past_mask", *memory_names(len(stack), "decoder")]
        self.has_mask = decoder_reads(model) == "fusion"
        if self.has_mask:
            inputs.append("memory_mask")
        sizes = _state_sizes(model)
        self.describe(model, inputs, ["logits", "present"], "texts", layers=len(stack), **sizes)

    def forward(
        self, token_ids: Tensor, past: Tensor, past_mask: Tensor, *memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits `[B, T, vocabulary]`, and keys and values of the token `[B, T, layers, 2, H, D]`."""
        batch, texts = token_ids.shape
        rows, embeddings = batch * texts, self.decoder.roberta.embeddings
        mask = past_mask.reshape(rows, -1)
        x = embeddings(token_ids.reshape(rows), mask.sum(1) + embeddings.pad_token_id + 1)[:, None]
        hidden = additive_mask(F.pad(mask, (0, 1), value=1), x.dtype)
        memory_mask = additive_mask(memory[-1], x.dtype) if self.has_mask else None
        past = past.flatten(0, 1)
        present = []
        stack = self.decoder.roberta.encoder
        for index, (linear, layer) in enumerate(zip(self.linears, stack, strict=True)):
            q, k, v = split_heads(linear(x), 3, self.heads)
            keys = torch.cat([past[:, index, 0], k], dim=2)
            values = torch.cat([past[:, index, 1], v], dim=2)
            present += [k[:, :, 0], v[:, :, 0]]
            # TensorRT for RTX 1.7 builds no attention of one query over a past of any length.
            context = attention(q, keys, values, hidden, "primitives").transpose(1, 2).flatten(2)
            x = layer.attention.output(context, x)
            pair = memory[2 * index : 2 * index + 2]
            x = layer.feed_forward(cross_attention(layer, x, pair, memory_mask, "primitives"))
        new = torch.stack(present, dim=1)
        new = new.reshape(batch, texts, -1, 2, self.heads, new.shape[-1])
        return self.decoder.logits(x).reshape(batch, texts, -1), new


def decoder_reads(model: XFM) -> Literal["image", "fusion"] | None:
    """Return what the decoder of a model attends to; None without a decoder."""
    return model.decoder_reads if isinstance(model, TaskModel) else None


def _state_sizes(model: XFM) -> dict[str, int]:
    """Return width and, for images, length of a decoder state; questions have any length."""
    config = model.config
    if decoder_reads(model) == "fusion":
        return {"states_width": config.text_width}
    return {"states_width": config.vision_width, "length": config.num_image_tokens}


GRAPH_CLASSES: dict[GraphName, type[Graph]] = {
    "vision": VisionGraph,
    "text": TextGraph,
    "image_memory": ImageMemoryGraph,
    "fusion": FusionGraph,
    "match": MatchGraph,
    PAIR_GRAPH: PairGraph,
    "decoder_memory": DecoderMemoryGraph,
    "decoder_step": DecoderStepGraph,
}


def default_graphs(model: XFM) -> tuple[GraphName, ...]:
    """Return the default graphs: all but `match` of a pretrained model, those of its task for a fine-tuned one."""
    if isinstance(model, TaskModel) and model.own_graphs:
        return ("vision", "text", "image_memory", *model.own_graphs)  # pyright: ignore[reportReturnType]
    match decoder_reads(model):
        case "image":
            return ("vision", "decoder_memory", "decoder_step")
        case "fusion":
            return (*DEFAULT_GRAPHS, "decoder_memory", "decoder_step")
    modality = getattr(model, "modality", "pair")
    if modality == "pair":
        return DEFAULT_GRAPHS
    return ("vision",) if modality == "image" else ("text",)


def needs_all_tokens(model: XFM, all_tokens: bool) -> bool:
    """Return whether `fusion` returns every token: on request, or because a decoder reads them."""
    return all_tokens or decoder_reads(model) == "fusion"


def build(
    name: GraphName,
    model: XFM,
    form: AttentionForm,
    *,
    all_tokens: bool = False,
    packed: bool = False,
) -> Graph:
    """Build a graph in evaluation mode that shares the model's parameters; its outputs follow the model's heads."""
    if name not in ALL_GRAPHS:
        raise UnavailableError(f"graph {name!r} is unknown; choose from {', '.join(ALL_GRAPHS)}")
    if is_frozen(model):
        raise InputError(
            "the model is frozen for inference, and a graph holds its weights; call unfreeze() first"
        )
    if lacks := _missing_modules(name, model):
        raise UnavailableError(
            f"graph {name!r} needs {' and '.join(lacks)}, which this model was built without; export other graphs"
        )
    if name == "fusion":
        fusion = PackedFusionGraph if packed else FusionGraph
        return fusion(model, form, all_tokens=all_tokens).eval()
    graph: Any = PackedTextGraph if packed and name == "text" else GRAPH_CLASSES[name]
    return graph(model, form).eval()


def _missing_modules(name: GraphName, model: XFM) -> list[str]:
    """List what a graph needs and the model lacks, in words."""
    if name.startswith("decoder_"):
        return ["a decoder"] if decoder_reads(model) is None else []
    needs = {"vision": ["vision"], "text": ["text"], "match": ["vision", "text", "fusion"]}
    encoders = needs.get(name, ["fusion"])
    lacks = [
        f"the {encoder} encoder" for encoder in encoders if not hasattr(model, f"{encoder}_encoder")
    ]
    if name == "match" and "matching" not in model.heads:
        lacks.append("the head 'matching'")
    if name not in (*GRAPHS, *getattr(model, "own_graphs", ())):
        lacks.append(f"the head of the task {name}")
    if "fusion" in encoders and not model.config.fusion_layers:
        lacks.append("fusion layers")
    return lacks


def is_memory(name: str) -> bool:
    """Return whether a tensor has the keys or values of a fusion layer."""
    return name.startswith(("memory_keys_", "memory_values_"))


def memory_names(layers: int, prefix: str = "memory") -> list[str]:
    """Name the keys and values of layers, in the order of graph inputs and outputs."""
    return [f"{prefix}_{side}_{layer}" for layer in range(layers) for side in ("keys", "values")]


def in_dtype(module: M, dtype: torch.dtype) -> M:
    """Return the module in `dtype`, copying only if needed."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    if all(tensor.dtype == dtype for tensor in tensors):
        return module
    # Converted tensor by tensor: a copy of the module first would hold all weights in the old dtype.
    converted: dict[int, Any] = {}
    for tensor in tensors:
        value = tensor.detach().to(dtype)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        converted[id(tensor)] = value
    return copy.deepcopy(module, converted).to(dtype)


@dataclass(frozen=True)
class SessionMemory:
    """Keys and values `[B, H, M, D]` of the layers that read B images or decoder states, by the graph's input names.

    Decoder states of different lengths have a mask `[B, M]`.
    """

    layers: Mapping[str, Tensor]
    mask: Tensor | None = None

    @property
    def images(self) -> int:
        """Number of the images or states."""
        return next(iter(self.layers.values())).shape[0]

    states = images

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs of the graph that reads it."""
        return {**self.layers, **({} if self.mask is None else {"memory_mask": self.mask})}

    def select(self, index: Tensor | slice) -> SessionMemory:
        """Return the memory of some of the images or states; a slice shares storage."""

        def select(value: Tensor) -> Tensor:
            if isinstance(index, slice):
                return value[index]
            return value.index_select(0, index.to(value.device))

        layers = {name: select(layer) for name, layer in self.layers.items()}
        return SessionMemory(layers, None if self.mask is None else select(self.mask))

    def part(self, start: int, stop: int) -> SessionMemory:
        """Return the states from `start` to `stop`, without a copy."""
        return self.select(slice(start, stop))

    def rows(self, images: Sequence[int]) -> SessionMemory:
        """Return the memory of some images; consecutive ones share storage."""
        start, stop = images[0], images[0] + len(images)
        consecutive = [*images] == [*range(start, stop)]
        return self.select(slice(start, stop) if consecutive else torch.tensor(images))
