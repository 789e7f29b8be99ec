"""The post-norm layer, embeddings and vocabulary head of BERT (arXiv 1810.04805) in fused ops, on third-party modules.

Layers are matched by the names of their submodules, which RoBERTa, ALBEF, X-VLM, X²-VLM, BLIP and X-FM share.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import host, ops
from xfm_fast.kernels.cpu.norms import embed_layer_norm_forward
from xfm_fast.kernels.derived import derived
from xfm_fast.packing import Packing, offsets, on_host
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.cached_plan import FEW, cached_plan, infers
from xfm_fast.replace.structure import Attend, Parts, post_norm_mlp, proj_residual_norm, self_attention
from xfm_fast.replace.swap import (
    CalledByName,
    Kinds,
    Settings,
    find,
    is_erf_gelu,
    observed,
    probability,
    why_not_bypassed,
)

_BRANCH: dict[str, Kinds] = {
    "self": nn.Module,
    "self.query": (nn.Linear, Adaptable),
    "self.key": (nn.Linear, Adaptable),
    "self.value": (nn.Linear, Adaptable),
    "self.dropout": nn.Dropout,
    "output": nn.Module,
    "output.dense": (nn.Linear, Adaptable),
    "output.dropout": nn.Dropout,
    "output.LayerNorm": nn.LayerNorm,
    "output.drop_path": nn.Module,
}
_MLP: dict[str, Kinds] = {
    "intermediate": nn.Module,
    "intermediate.dense": (nn.Linear, Adaptable),
    "output": nn.Module,
    "output.dense": (nn.Linear, Adaptable),
    "output.dropout": nn.Dropout,
    "output.LayerNorm": nn.LayerNorm,
    "output.drop_path": nn.Module,
}


def _branch(name: str) -> dict[str, Kinds]:
    return {name: nn.Module, **{f"{name}.{part}": kind for part, kind in _BRANCH.items()}}


# Parts of a layer by dotted name with their classes; nn.Module accepts any.
LAYER_PARTS: dict[str, Kinds] = _branch("attention") | _branch("crossattention") | _MLP
# Linear layers on one input, computed by one GEMM.
LAYER_JOINT = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("crossattention.self.key", "crossattention.self.value"),
)


def is_layer(module: nn.Module) -> bool:
    """True if a module has the submodules of a BERT layer, with or without cross-attention."""
    crosses = has_cross_attention(module)
    # Stochastic depth is an addition of X²-VLM.
    required = (name for name in LAYER_PARTS if not name.endswith("drop_path"))
    needed = (name for name in required if crosses or not name.startswith("crossattention"))
    return (
        all(find(module, name) is not None for name in needed)
        and hasattr(find(module, "attention.self"), "num_attention_heads")
        and hasattr(find(module, "intermediate"), "intermediate_act_fn")
    )


def has_cross_attention(layer: nn.Module) -> bool:
    """True if a layer has cross-attention."""
    return find(layer, "crossattention") is not None


def drops_paths(layer: nn.Module) -> bool:
    """True if stochastic depth is active; X²-VLM draws it per position across all texts."""
    parts = (find(layer, f"{name}output.drop_path") for name in ("attention.", "crossattention.", ""))
    return any(part is not None and part.training and getattr(part, "drop_prob", None) for part in parts)


def why_not_plain(layer: nn.Module) -> str | None:
    """Why the attention of a layer differs from BERT's; None if it does not."""
    for name in ("attention.self", "crossattention.self"):
        positions = getattr(find(layer, name), "position_embedding_type", None)
        if positions not in ("absolute", None):
            return f"its attention has {positions} positions"
    if hasattr(layer, "intermediate_query"):
        return "it attends with query tokens in addition to the text"
    return None


@dataclass
class Padded:
    """Attention of a padded batch, `[B, L, H, D]`."""

    mask: Tensor | None = None  # as for `scaled_dot_product_attention`, or a key padding mask `[B, L]`
    causal: bool = False  # only without a mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        mask = self.mask
        if mask is not None and mask.ndim == 2:
            return attend_to_real_keys(q, k, v, mask, dropout_p, settings=settings).flatten(-2)
        if mask is not None and mask.is_floating_point() and mask.dtype != q.dtype:
            # The lowest value of a wide dtype would overflow to -inf in a narrow one.
            mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if mask is not None and mask.is_floating_point() and torch.is_grad_enabled():
            # For a query without visible keys the fused kernels have different gradients.
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask).softmax(-1)
            return (F.dropout(weights, dropout_p) @ v).transpose(1, 2).flatten(-2)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, self.causal)
        return out.transpose(1, 2).flatten(-2)


@dataclass
class Packed:
    """Attention of packed sequences `[T, H, D]` over own keys or a memory; fields as in `ops.varlen_attention`."""

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    key_mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        layout = (self.cu_q, self.cu_k, self.longest_q, self.longest_k)
        out = ops.varlen_attention(
            q, k, v, *layout, dropout_p=dropout_p, key_mask=self.key_mask, backend=settings.backend
        )
        return out.flatten(-2)


@dataclass
class EqualLengths:
    """Attention of a few packed sequences of equal length `[T, H, D]`, run as a padded batch."""

    texts: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        q, k, v = (t.unflatten(0, (self.texts, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p).transpose(1, 2).flatten(0, 1).flatten(-2)


def is_small(packing: Packing, settings: Settings) -> bool:
    """True if there is no padding and so few tokens that attention is bound by call overhead."""
    return packing.whole and packing.positions.shape[0] <= FEW and settings.backend is None


def to_own_tokens(packing: Packing, settings: Settings) -> Attend:
    """Self-attention of packed texts."""
    if is_small(packing, settings):
        return EqualLengths(packing.shape[0])
    cu, longest = packing.cu_seqlens, packing.longest
    return Packed(cu, cu, longest, longest, packing.key_mask)


@dataclass
class Memory:
    """What cross-attention attends to."""

    states: Tensor  # `[..., width]`, or keys and values `[..., 2, H, D]` if projected
    attend: Attend
    shared: bool = False  # one memory for the whole padded batch, whose queries form one sequence
    projected: bool = False  # states are the keys and values of the layer that runs


def attend_to_real_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dropout_p: float,
    scale: float | None = None,
    settings: Settings | None = None,
) -> Tensor:
    """Attention of padded queries `[B, L, H, D]` over the keys `[B, N, H, D]` whose `mask` `[B, N]` is non-zero."""
    if torch.compiler.is_exporting():
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        shown = mask.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, shown, dropout_p, scale=scale).transpose(1, 2)
    # All layers of a model get the same mask.
    keys = derived("packed keys", (mask,), lambda: Packing.from_mask(mask))
    texts, length = q.shape[:2]
    out = ops.varlen_attention(
        q.flatten(0, 1),
        keys.pack(k),
        keys.pack(v),
        torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=q.device),
        keys.cu_seqlens,
        length,
        keys.longest,
        dropout_p=dropout_p,
        scale=scale,
        backend=None if settings is None else settings.backend,
    )
    return out.unflatten(0, (texts, length))


def is_expanded(states: Tensor) -> bool:
    """True if `[B, N, width]` states were expanded from one memory, so that projecting it once suffices."""
    return states.shape[0] > 1 and states.stride(0) == 0


def plan(mask: Tensor, memory_mask: Tensor | None = None, *, keep_first: bool) -> tuple[Packing, bool] | None:
    """Packing of a mask `[P, L]`, with one device sync, and whether `memory_mask` `[P, N]` hides nothing.

    With `keep_first`, token 0 of every text stays a query even if it is padding, because poolers read it. None if a
    text has no token at all.
    """
    mask = mask.bool()
    if torch.compiler.is_compiling():
        return _traced_plan(mask, keep_first), memory_mask is None
    if not mask.numel():
        return None
    if on_host(mask) and host.all_true(mask):
        texts, length = mask.shape
        places, ends = torch.arange(texts * length), torch.arange(0, texts * length + 1, length, dtype=torch.int32)
        whole = memory_mask is None or host.all_true(memory_mask.bool())
        packing = Packing(positions=places, cu_seqlens=ends, shape=(texts, length), max_seqlen=length, whole=True)
        return packing, whole
    kept = mask.clone() if keep_first else mask
    if keep_first:
        kept[:, 0] = True
    lengths = kept.sum(1)
    whole = mask.new_ones(()) if memory_mask is None else memory_mask.bool().all()
    truths = (mask.any(1).all(), mask[:, 0].all(), whole)
    facts = torch.stack([lengths.max(), lengths.sum(), *(truth.long() for truth in truths)])
    longest, total, none_empty, first_real, whole_memory = host.integers(facts) if on_host(facts) else facts.tolist()
    if not none_empty:
        return None
    flat = kept.flatten()
    # A stable sort moves real tokens to the front, in order, without the device sync of `nonzero`.
    order = host.true_places(flat) if on_host(flat) else flat.logical_not().to(torch.uint8).argsort(stable=True)
    places = order[:total]
    key_mask = None if first_real or not keep_first else mask.flatten()[places]
    shape = (mask.shape[0], mask.shape[1])
    packing = Packing(
        positions=places, cu_seqlens=offsets(lengths), shape=shape, key_mask=key_mask, max_seqlen=int(longest)
    )
    return packing, bool(whole_memory)


def _traced_plan(mask: Tensor, keep_first: bool) -> Packing:
    """`plan` in a traced graph, without control flow on values: padding at token 0 attends to real tokens."""
    kept = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1) if keep_first else mask
    places = kept.flatten().nonzero().flatten()
    return Packing(
        positions=places,
        cu_seqlens=offsets(kept.sum(1)),
        shape=(mask.shape[0], mask.shape[1]),
        key_mask=mask.flatten().index_select(0, places) if keep_first else None,
        max_seqlen=mask.shape[1],
    )


def packed_memory(states: Tensor, mask: Tensor | None, packing: Packing) -> Memory:
    """The memory `[P, N, width]` of packed texts; `mask` `[P, N]` is non-zero for visible tokens."""
    texts, length = states.shape[:2]
    cu, device = packing.cu_seqlens, states.device
    if mask is None and is_expanded(states):
        tokens = packing.positions.shape[0]
        queries, keys = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (tokens, length))
        return Memory(states[0], Packed(queries, keys, tokens, length))
    keys = torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=device)
    key_mask = None if mask is None else mask.bool().flatten()
    return Memory(states.flatten(0, 1), Packed(cu, keys, packing.longest, length, key_mask))


def padded_memory(states: Tensor, mask: Tensor | None) -> Memory:
    """The memory `[B, N, width]` of a padded batch."""
    if mask is None and is_expanded(states):
        return Memory(states[:1], Padded(), shared=True)
    return Memory(states, Padded(mask))


def run_layer(
    layer: Any,
    x: Tensor,
    attend: Attend,
    settings: Settings,
    memory: Memory | None = None,
    *,
    reads: Tensor | None = None,
    intact: bool = False,
) -> Tensor:
    """Run a BERT layer on padded `[B, L, width]` or packed `[T, width]` tokens, with cross-attention to a memory.

    The residual keeps its dtype. With `reads` `[Q]`, only these packed rows are queries: returns `[Q, width]`. `intact`
    marks a fused layer whose `intact()` was just checked.
    """
    if intact and memory is None and reads is None:
        ready = cached_plan(layer, lambda: _parts(layer), x, settings, wide=True)
        if ready is not None:
            return ready.run(x, attend, settings)
    parts = _parts(layer)
    if reads is None:
        context = self_attention(parts, x, attend, settings)
    else:
        k, v = keys_values(layer.attention, x, settings)
        x = x.index_select(0, reads)
        context = attend(_query(layer.attention.self, x, settings), k, v, parts.attention_p, settings)
    x = _close(layer.attention.output, context, x, settings)
    if memory is not None:
        cross, states = layer.crossattention, memory.states
        k, v = states.unbind(-3) if memory.projected else keys_values(cross, states, settings)
        q = _query(cross.self, x, settings)
        # One memory for the whole padded batch: all queries form one sequence.
        queries = q.flatten(0, 1)[None] if memory.shared else q
        context = memory.attend(queries, k, v, _dropout_p(cross.self), settings).view(*q.shape[:-2], -1)
        x = _close(cross.output, context, x, settings)
    return post_norm_mlp(parts, x, settings)


def _parts(layer: Any) -> Parts:
    """`Parts` of a layer without cross-attention."""
    own, ends = layer.attention.self, (layer.attention.output, layer.output)
    activation = layer.intermediate.intermediate_act_fn
    fc1 = layer.intermediate.dense
    return Parts(
        norms=(ends[0].LayerNorm, ends[1].LayerNorm),
        projections=(own.query, own.key, own.value),
        heads=own.num_attention_heads,
        scale=1.0,
        proj=ends[0].dense,
        fc1=fc1,
        fc2=ends[1].dense,
        hidden=None if is_erf_gelu(activation) else lambda x, linear: activation(linear(fc1, x)),
        activation=attrgetter("intermediate.intermediate_act_fn"),
        attention_p=_dropout_p(own),
        branch_p=(probability(ends[0].dropout), probability(ends[1].dropout)),
    )


def keys_values(attention: Any, states: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """`[..., width]` → keys and values, `[..., H, D]` each, with one GEMM."""
    projections = attention.self
    k, v = settings.products("kv", states, projections.key, projections.value)
    heads = projections.num_attention_heads
    return k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))


def _query(projections: Any, x: Tensor, settings: Settings) -> Tensor:
    (q,) = settings.products("query", x, projections.query)
    return q.unflatten(-1, (projections.num_attention_heads, -1))


def _close(end: Any, x: Tensor, residual: Tensor, settings: Settings) -> Tensor:
    """Linear layer, dropout, residual and LayerNorm at the end of a branch."""
    p = probability(end.dropout)
    return proj_residual_norm(x, end.dense, residual, end.LayerNorm, settings, dropout_p=p, wide=True)[0]


def _dropout_p(projections: Any) -> float:
    """Dropout probability of the attention weights."""
    return projections.dropout.p if projections.training else 0.0


class BertLayer(CalledByName):
    """Base of the fused forms that `run_layer` computes."""

    joint = LAYER_JOINT


class FusedEmbeddings(CalledByName):
    """Word, position and type embeddings with LayerNorm in one pass."""

    bypassed: ClassVar[Any] = {
        "word_embeddings": nn.Embedding,
        "position_embeddings": nn.Embedding,
        "token_type_embeddings": nn.Embedding,
        "LayerNorm": nn.LayerNorm,
        "dropout": nn.Dropout,
    }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        tokens, past = call.get("input_ids"), call.get("cache_length", call.get("past_key_values_length", 0))
        types = call.get("token_type_ids")
        # The fused op covers token type 0 only; on an accelerator the check would sync, so only None qualifies.
        first_type = types is None or (on_host(types) and not host.any_true(types.ne(0)))
        plain = call.get("inputs_embeds") is None and first_type
        if tokens is None or not plain or not isinstance(past, int) or past or not self.intact() or not self._exact():
            return super().forward(*args, **kwargs)
        positions = call.get("position_ids")
        if positions is None:
            positions = default_positions(self, tokens)
        with self.settings.own_types(tokens.device):
            return self.embed(tokens, positions.expand(tokens.shape))

    def _exact(self) -> bool:
        """False where the op's gradient differs from `nn.Embedding`: max_norm, sparse, different padding_idx."""
        module: Any = self
        tables = (module.word_embeddings, module.position_embeddings)
        if any(table.max_norm is not None or table.scale_grad_by_freq or table.sparse for table in tables):
            return False
        return not torch.is_grad_enabled() or tables[0].padding_idx == tables[1].padding_idx

    def embed(
        self, tokens: Tensor | None, positions: Tensor, types: Tensor | None = None, embeds: Tensor | None = None
    ) -> Tensor:
        """Token ids or word embeddings → embeddings after LayerNorm and dropout."""
        module: Any = self
        table, norm = getattr(module, "token_type_embeddings", None), module.LayerNorm
        word, position = module.word_embeddings, module.position_embeddings
        if embeds is None and types is None and self._exact():
            assert tokens is not None
            row = torch.zeros_like(norm.weight) if table is None else table.weight[0]
            given = (tokens, positions, word.weight, position.weight, row, norm.weight, norm.bias, norm.eps)
            if infers(word.weight, self.settings) and word.weight.dtype == norm.weight.dtype:
                normed = embed_layer_norm_forward(*given)[0]
            else:
                backend = self.settings.backend
                normed = ops.embed_layer_norm(*given, padding_idx=word.padding_idx, backend=backend)
        else:
            summed = word(tokens) if embeds is None else embeds
            if table is not None:
                summed = summed + (table.weight[0] if types is None else table(types))
            summed = summed + position(positions)
            normed = F.layer_norm(summed, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return module.dropout(normed)


def default_positions(embeddings: Any, tokens: Tensor) -> Tensor:
    """Position ids `[P, L]` or `[1, L]`: BERT counts all tokens, RoBERTa skips padding."""
    pad = getattr(embeddings, "padding_idx", None)
    if pad is None:
        return embeddings.position_ids[:, : tokens.shape[1]]
    real = tokens.ne(pad)
    return real.cumsum(1) * real + pad


class VocabularyHead(CalledByName):
    """Masked-language head: dense, GELU, LayerNorm and vocabulary projection."""

    multiplies_in_eight_bits: ClassVar[bool] = False
    bypassed: ClassVar[Any] = {
        "dense": (nn.Linear, Adaptable),
        "layer_norm": nn.LayerNorm,
        "transform.dense": (nn.Linear, Adaptable),
        "transform.LayerNorm": nn.LayerNorm,
        "decoder": nn.Linear,
    }

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        features = self.arguments(args, kwargs).get(self.names[0])
        if features is None or not self.intact():
            return super().forward(*args, **kwargs)
        with self.settings.own_types(features.device):
            return self.logits(self.transformed(features))

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return why_not_bypassed(module, cls.bypassed)

    def intact(self) -> bool:
        transform = self._modules.get("transform")
        return super().intact() and (transform is None or not observed(transform))

    def transformed(self, features: Tensor) -> Tensor:
        """`[..., width]` → input of the vocabulary projection."""
        module, settings = cast(Any, self), self.settings
        if "transform" in self._modules:
            dense, norm, activation = (getattr(module.transform, n) for n in ("dense", "LayerNorm", "transform_act_fn"))
        else:
            # RoBERTa's head calls F.gelu, BERT's has a module.
            dense, norm, activation = module.dense, module.layer_norm, F.gelu
        x = settings.activated(features, dense, activation)
        scale, shift = settings.affine(norm.weight, norm.bias)
        return ops.layer_norm(x, scale.to(x.dtype), shift.to(x.dtype), norm.eps, backend=settings.backend)

    def vocabulary(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, width]` and bias `[V]` in the compute dtype."""
        module: Any = self
        return self.settings.affine(module.decoder.weight, module.decoder.bias)

    def logits(self, transformed: Tensor) -> Tensor:
        """`[..., width]` → `[..., V]`."""
        weight, bias = self.vocabulary()
        return ops.linear(transformed, weight, bias, backend=self.settings.backend)
