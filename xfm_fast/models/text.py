"""RoBERTa on packed tokens: heads, post-norm layers and the text encoder."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.kernels import ops
from xfm_fast.kernels.caching import cached
from xfm_fast.kernels.cpu import gemm
from xfm_fast.kernels.cpu.attention import plain_attention
from xfm_fast.kernels.flags import concatenate, kind_of
from xfm_fast.models.shares import LEAST_TOKENS, Texts, can_chunk, run_chunked, without_hooks
from xfm_fast.packing import Packing, Reads
from xfm_fast.plans.orders import LayerModules
from xfm_fast.plans.plan import DTYPES, Layers, infers, plan_of, valid_plan
from xfm_fast.plans.recording import Added, Embedded, Layout, Pooling


class MLPHead(nn.Sequential):
    """Linear(d, 2d) · LayerNorm · GELU · Linear(2d, outputs), for matching, boxes and classification."""

    def __init__(self, inputs: int, outputs: int, eps: float = 1e-5) -> None:
        super().__init__(
            nn.Linear(inputs, 2 * inputs),
            nn.LayerNorm(2 * inputs, eps=eps),
            nn.GELU(),
            nn.Linear(2 * inputs, outputs),
        )


class DeepMLPHead(nn.Sequential):
    """The official five-layer image classification head (d → 2d → 4d → 2d → d → classes)."""

    def __init__(self, inputs: int, outputs: int, eps: float = 1e-5) -> None:
        layers: list[nn.Module] = []
        widths = [inputs, 2 * inputs, 4 * inputs, 2 * inputs, inputs]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.LayerNorm(after, eps=eps), nn.GELU()]
        super().__init__(*layers, nn.Linear(inputs, outputs))


class LMHead(nn.Module):
    """Head of masked or causal language modelling, whose vocabulary matrix is an argument of `forward`."""

    def __init__(self, width: int, vocabulary: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(self.dense.bias.new_zeros(vocabulary))

    def transform(self, hidden: Tensor) -> Tensor:
        """Compute the input of the vocabulary projection: `[..., width]` → `[..., width]`."""
        norm = self.layer_norm
        activated = ops.linear_gelu(hidden, self.dense.weight, self.dense.bias)
        return ops.layer_norm(activated, norm.weight, norm.bias, norm.eps)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Compute logits over the vocabulary: `[..., width]` → `[..., vocabulary]`."""
        return ops.linear(self.transform(hidden), word_embeddings, self.bias)


def concatenated(name: str, *tensors: Tensor) -> Tensor:
    """Concatenate parameters along the first dimension, so that one GEMM computes several layers."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return torch.cat(tensors)
    return cached(name, tensors, lambda: concatenate(tensors))


def _joined_linear(name: str, x: Tensor, *layers: nn.Linear) -> Tensor:
    """Compute several linear layers in one GEMM: `[..., inputs]` → `[..., Σ outputs]`."""
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    trained = any(parameter.requires_grad for parameter in (*weights, *biases))
    if trained and torch.is_grad_enabled() and x.device.type == "cpu":
        return ops.joined_linear(x, weights, biases)
    weight = concatenated(f"{name} weight", *weights)
    return ops.linear(x, weight, concatenated(f"{name} bias", *biases))


class AttentionProjections(nn.Module):
    """Query, key and value projections of self-attention, or of cross-attention to a memory."""

    def __init__(self, config: XFMConfig, memory_width: int | None = None) -> None:
        super().__init__()
        self.heads = config.text_heads
        self.dropout = config.attention_dropout
        width = config.text_width
        memory_width = width if memory_width is None else memory_width
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width)
        self.value = nn.Linear(memory_width, width)

    @property
    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def project_all(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project `[T, width]` to q, k and v `[T, H, D]` in one GEMM, or two if the model is frozen."""
        if gemm.is_frozen(self.key.weight):
            k, v = self.project_memory(x).unbind(-3)
            return self.project_query(x), k, v
        joined = _joined_linear("qkv", x, self.query, self.key, self.value)
        q, k, v = joined.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def project_query(self, x: Tensor) -> Tensor:
        """Project `[T, width]` to queries `[T, H, D]`."""
        return ops.linear(x, self.query.weight, self.query.bias).unflatten(-1, (self.heads, -1))

    def project_memory(self, memory: Tensor) -> Tensor:
        """Project `[..., memory_width]` to keys and values `[..., 2, H, D]` in one GEMM."""
        if gemm.is_frozen(self.key.weight):
            # The frozen weight of the keys holds that of the values too.
            bias = concatenated("kv bias", self.key.bias, self.value.bias)
            joined = ops.linear(memory, self.key.weight, bias)
        else:
            joined = _joined_linear("kv", memory, self.key, self.value)
        return joined.unflatten(-1, (2, self.heads, -1))


class ResidualNorm(nn.Module):
    """The end of a post-norm branch: `LayerNorm(residual + dropout(dense(x)))`."""

    def __init__(self, config: XFMConfig, inputs: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.dense = nn.Linear(inputs, config.text_width)
        self.LayerNorm = nn.LayerNorm(config.text_width, eps=config.text_layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add `dense(x)` of `[T, inputs]` to the residual `[T, width]` and normalise the sum."""
        dense, norm = self.dense, self.LayerNorm
        normed, _ = ops.linear_add_layer_norm(
            x,
            dense.weight,
            dense.bias,
            residual,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=self.dropout if self.training else 0.0,
            wide=True,
        )
        return normed


class Attention(nn.Module):
    """Projections and output of one attention branch."""

    def __init__(self, config: XFMConfig, memory_width: int | None = None) -> None:
        super().__init__()
        self.self = AttentionProjections(config, memory_width)
        self.output = ResidualNorm(config, config.text_width)

    def attend(
        self,
        residual: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        longest_q: int,
        longest_k: int,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend with the projected `qkv`; then output projection, residual and norm: `[T, width]`."""
        context = ops.varlen_attention(
            *qkv,
            cu_seqlens_q,
            cu_seqlens_k,
            longest_q,
            longest_k,
            dropout_p=self.self.dropout_p,
            key_mask=key_mask,
        )
        return self.output(context.flatten(-2), residual)


class Intermediate(nn.Module):
    """First linear layer of the MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)


class TransformerLayer(nn.Module):
    """Post-norm RoBERTa layer: self-attention, cross-attention (with a `memory_width`), MLP."""

    def __init__(self, config: XFMConfig, memory_width: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(config)
        if memory_width is not None:
            self.crossattention = Attention(config, memory_width)
        self.intermediate = Intermediate(config.text_width, config.text_intermediate)
        self.output = ResidualNorm(config, config.text_intermediate)

    def self_attention(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        key_mask: Tensor | None = None,
        *,
        reads: Reads | None = None,
    ) -> Tensor:
        """Compute self-attention, residual and norm: `[T, width]` → `[T, width]`, or `[Q, width]` with Q reads."""
        projections = self.attention.self
        if reads is None:
            qkv = projections.project_all(x)
            return self.attention.attend(x, qkv, cu_seqlens, cu_seqlens, longest, longest, key_mask)
        read = x.index_select(0, reads.rows)
        k, v = projections.project_memory(x).unbind(-3)
        qkv = (projections.project_query(read), k, v)
        return self.attention.attend(
            read, qkv, reads.cu_seqlens, cu_seqlens, reads.longest, longest, key_mask
        )

    def cross_attention(
        self,
        x: Tensor,
        keys_values: Tensor,
        cu_queries: Tensor,
        cu_keys: Tensor,
        longest_keys: int,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute cross-attention of `[T, width]`, grouped by memory, to `[M, 2, H, D]`, residual and norm."""
        k, v = keys_values.unbind(-3)
        qkv = (self.crossattention.self.project_query(x), k, v)
        # All queries bound the longest group: a tighter bound would synchronise.
        return self.crossattention.attend(
            x, qkv, cu_queries, cu_keys, x.shape[0], longest_keys, key_mask
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        """Compute MLP, residual and norm: `[T, width]` → `[T, width]`."""
        first, second, norm = self.intermediate.dense, self.output.dense, self.output.LayerNorm
        if x.device.type != "cpu" or (self.training and self.output.dropout):
            # A GPU fuses the sum with the norm, a CPU with the GEMM.
            return self.output(ops.linear_gelu(x, first.weight, first.bias), x)
        summed = ops.mlp_residual(x, first.weight, first.bias, second.weight, second.bias, x)
        return ops.layer_norm(summed, norm.weight, norm.bias, norm.eps)

    def modules_of(self) -> LayerModules:
        """Return the modules of a layer without cross-attention."""
        attention: Any = self.attention
        return LayerModules(
            norms=(attention.output.LayerNorm, self.output.LayerNorm),
            heads=attention.self.heads,
            proj=attention.output.dense,
            inner=(self.intermediate.dense,),
            fc2=self.output.dense,
            projections=(attention.self.query, attention.self.key, attention.self.value),
        )


class Embeddings(nn.Module):
    """Word, position and type embeddings of packed tokens, LayerNorm and dropout."""

    def __init__(self, config: XFMConfig) -> None:
        super().__init__()
        width, pad = config.text_width, config.pad_token_id
        self.pad_token_id = pad
        self.dropout = config.hidden_dropout
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        self.position_embeddings = nn.Embedding(config.max_positions, width, padding_idx=pad)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.text_layer_norm_eps)

    def position_ids(self, input_ids: Tensor) -> Tensor:
        """Number the real tokens `[P, L]` from pad + 1 on, and padding pad (RoBERTa, arXiv 1907.11692)."""
        real = input_ids.ne(self.pad_token_id)
        return real.cumsum(1) * real + self.pad_token_id

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed packed ids and position ids, `[T]` each: `[T, width]`."""
        normed = ops.embed_layer_norm(
            tokens,
            positions,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight[0],
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            padding_idx=self.pad_token_id,
        )
        return F.dropout(normed, self.dropout, self.training) if self.training else normed


class LayerStack(nn.Module):
    """The layers, under the official name `encoder.layer`."""

    def __init__(self, layers: list[TransformerLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[TransformerLayer]:
        return cast("Iterator[TransformerLayer]", iter(self.layer))

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, index: int) -> TransformerLayer:
        layer = self.layer[index]
        assert isinstance(layer, TransformerLayer)
        return layer

    def can_chunk(self, tokens: int) -> bool:
        """Return whether texts may run in one chunk per thread, and have enough tokens for it to pay."""
        layers = self.layer
        # With few rows, each thread would read all weights for itself.
        if not layers or tokens < LEAST_TOKENS * torch.get_num_threads():
            return False
        if not can_chunk(self[0].intermediate.dense.weight):
            return False
        return without_hooks(layers, "self_attention", "cross_attention", "feed_forward")

    def kind(self, texts: Texts) -> tuple[Hashable, ...]:
        """Return the key of `shares.run_chunked` for texts."""
        return kind_of(self[0].intermediate.dense.weight), len(self.layer), texts.kind


def initialise_text(module: nn.Module) -> None:
    """Initialise as RoBERTa: matrices and embeddings from normal(0, 0.02), biases and padding zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.padding_idx is not None:
                with torch.no_grad():
                    layer.weight[layer.padding_idx].zero_()


class TextTransformer(nn.Module):
    """Embeddings and layers, with cross-attention if there is a `memory_width`; officially `roberta`."""

    def __init__(self, config: XFMConfig, layers: int, memory_width: int | None = None) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack([TransformerLayer(config, memory_width) for _ in range(layers)])


def _attend_text(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within one text: `[T, H, D]` each."""
    return plain_attention(q[None], k[None], v[None], q.shape[-1] ** -0.5)[0].flatten(1)


def _attend_texts(packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within packed texts: `[T, H, D]` each."""
    layout = packing.cu_seqlens, packing.cu_seqlens, packing.longest, packing.longest
    return ops.varlen_attention(q, k, v, *layout).flatten(1)


class TextEncoder(nn.Module):
    """Text encoder and its head of masked language modelling."""

    def __init__(self, config: XFMConfig, *, lm_head: bool = True) -> None:
        super().__init__()
        self.roberta = TextTransformer(config, config.text_layers)
        if lm_head:
            self.lm_head = LMHead(config.text_width, config.vocab_size, config.text_layer_norm_eps)
        initialise_text(self)

    @property
    def word_embeddings(self) -> Tensor:
        return self.roberta.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        packing: Packing,
        *,
        first_token_only: bool = False,
        reads: Reads | None = None,
    ) -> Tensor:
        """Encode ids `[P, L]` as packed embeddings `[T, width]`, or `[Q, width]` with Q reads.

        With `first_token_only`, compute token 0 of every text: `[P, width]` in packed order.
        """
        embeddings, stack = self.roberta.embeddings, self.roberta.encoder
        positions = packing.pack(embeddings.position_ids(input_ids))
        tokens = packing.pack(input_ids).long()
        if reads is None and packing.key_mask is None:
            planned = self._run_planned(tokens, positions, packing, first_token_only)
            if planned is not None:
                return planned
        x = embeddings(tokens, positions)
        texts = Texts(x, packing)
        if reads is None and packing.key_mask is None and stack.can_chunk(len(x)):
            run = partial(self._encode, first_token_only=first_token_only)
            return run_chunked(run, texts, (first_token_only, *stack.kind(texts)))
        return self._encode(texts, reads, first_token_only)

    def _run_planned(
        self, tokens: Tensor, positions: Tensor, packing: Packing, first_token_only: bool
    ) -> Tensor | None:
        """Encode tokens `[T]` of one or few texts as one call of compiled code; None without a plan."""
        count, texts = len(tokens), len(packing.cu_seqlens) - 1
        if texts != 1 and not 0 < count < LEAST_TOKENS * torch.get_num_threads():
            return None
        embeddings, stack = self.roberta.embeddings, self.roberta.encoder
        words = embeddings.word_embeddings.weight
        if words.dtype not in DTYPES or not infers(None, words, tokens):
            return None
        if not without_hooks(stack.layer, "self_attention", "feed_forward"):
            return None
        plan = valid_plan(self.roberta)
        if plan is None:
            parts = embeddings.modules()
            if not len(stack) or {*map(type, stack)} != {TransformerLayer}:
                return None
            if {*map(type, parts)} != {Embeddings, nn.Embedding, nn.LayerNorm}:
                return None
            if {parameter.dtype for parameter in embeddings.parameters()} != {words.dtype}:
                return None
            orders, children = [True] * len(stack), ("encoder", "embeddings")
            layers = Layers([*stack], TransformerLayer.modules_of, orders, children, embeddings)
            plan = plan_of(self.roberta, layers, words.dtype, words.dtype, count)
        if plan is None:
            return None
        tables = (
            words,
            embeddings.position_embeddings.weight,
            embeddings.token_type_embeddings.weight,
        )
        x = Embedded((tokens, positions, None), tables, embeddings.LayerNorm)
        if texts == 1:
            pooling = Pooling("first") if first_token_only else None
            layout = Layout((count,), (1, count, count), pooling=pooling)
            return plan.run(x, _attend_text, layout, Added())
        longest = packing.longest
        layout = Layout((count,), (texts, longest, longest), packed=True)
        offsets = packing.cu_seqlens.to(torch.int64)
        states = plan.run(x, partial(_attend_texts, packing), layout, Added(offsets))
        if states is None or not first_token_only:
            return states
        return states.index_select(0, offsets[:-1])

    def _encode(
        self, texts: Texts, reads: Reads | None = None, first_token_only: bool = False
    ) -> Tensor:
        x, packing, stack = texts.tokens, texts.sequences, self.roberta.encoder
        if first_token_only:
            reads = Reads.first_tokens(packing)
        layers = [*stack]
        for index, layer in enumerate(layers, start=1):
            # The last layer computes only the reads.
            layer_reads = reads if index == len(layers) else None
            x = layer.self_attention(
                x, packing.cu_seqlens, packing.longest, packing.key_mask, reads=layer_reads
            )
            x = layer.feed_forward(x)
        if reads is not None and not len(stack):
            return x.index_select(0, reads.rows)
        return x
