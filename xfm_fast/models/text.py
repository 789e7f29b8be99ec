"""RoBERTa on packed tokens: the heads and the post-norm layer shared by all language modules, and the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.kernels import ops
from xfm_fast.kernels.caching import cached
from xfm_fast.kernels.cpu import gemm, int8
from xfm_fast.kernels.cpu.attention import plain_attention
from xfm_fast.kernels.flags import concatenate, kind_of
from xfm_fast.models.shares import LEAST_TOKENS, Texts, can_chunk, run_chunked, without_hooks
from xfm_fast.packing import Packing, Reads


class MLPHead(nn.Sequential):
    """Linear(d, 2d) · LayerNorm · GELU · Linear(2d, outputs): matching, boxes, classification."""

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
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), nn.LayerNorm(after, eps=eps), nn.GELU()]
        super().__init__(*layers, nn.Linear(inputs, outputs))


class LMHead(nn.Module):
    """Masked or causal language modelling head; the word embedding passed to `forward` is its vocabulary matrix."""

    def __init__(self, width: int, vocabulary: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(self.dense.bias.new_zeros(vocabulary))

    def transform(self, hidden: Tensor) -> Tensor:
        """Hidden states before the vocabulary projection: `[..., width]` → `[..., width]`."""
        activated = ops.linear_gelu(hidden, self.dense.weight, self.dense.bias)
        return ops.layer_norm(
            activated, self.layer_norm.weight, self.layer_norm.bias, self.layer_norm.eps
        )

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Logits over the vocabulary: `[..., width]` → `[..., vocabulary]`."""
        return ops.linear(self.transform(hidden), word_embeddings, self.bias)


_METHODS = ("self_attention", "cross_attention", "feed_forward")
# Tokens up to which reading weights and Python calls dominate a text's time.
_SHORT = 64


def concatenated(name: str, *parts: Tensor) -> Tensor:
    """Concatenate parameters along the first dimension, so one GEMM computes several layers."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in parts):
        return torch.cat(parts)
    return cached(name, parts, lambda: concatenate(parts))


def _joined_linear(name: str, x: Tensor, *layers: nn.Linear) -> Tensor:
    """Outputs of several linear layers, concatenated: `[..., inputs]` → `[..., Σ outputs]`."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and any(p.requires_grad for p in (*weights, *biases))
    ):
        return ops.joined_linear(x, weights, biases)
    return ops.linear(
        x, concatenated(f"{name} weight", *weights), concatenated(f"{name} bias", *biases)
    )


class AttentionProjections(nn.Module):
    """Query, key and value projections of self-attention, or of cross-attention to a memory of another width."""

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
        """`[T, width]` → q, k, v `[T, H, D]` in one GEMM, or two if the model is frozen."""
        if gemm.is_frozen(self.key.weight):
            k, v = self.project_memory(x).unbind(-3)
            return self.project_query(x), k, v
        joined = _joined_linear("qkv", x, self.query, self.key, self.value)
        q, k, v = joined.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def project_query(self, x: Tensor) -> Tensor:
        """`[T, width]` → `[T, H, D]`."""
        return ops.linear(x, self.query.weight, self.query.bias).unflatten(-1, (self.heads, -1))

    def project_memory(self, memory: Tensor) -> Tensor:
        """`[..., memory_width]` → keys and values `[..., 2, H, D]` in one GEMM."""
        if gemm.is_frozen(self.key.weight):
            # The frozen key weight contains the values too.
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
        """`[T, inputs]` and `[T, width]` → `[T, width]`."""
        dense, norm = self.dense, self.LayerNorm
        dropout_p = self.dropout if self.training else 0.0
        return ops.linear_add_layer_norm(
            x,
            dense.weight,
            dense.bias,
            residual,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=dropout_p,
            wide=True,
        )[0]


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
        """Attention of the projected `qkv`, output projection, residual and norm: `[T, width]`."""
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
    """Parameters of the first half of the MLP."""

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
        """Packed self-attention with residual and norm: `[T, width]` → `[T, width]`, or `[Q, width]` for Q reads."""
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
        """Queries `[T, width]`, grouped over memories with projections `[M, 2, H, D]`."""
        k, v = keys_values.unbind(-3)
        qkv = (self.crossattention.self.project_query(x), k, v)
        # All queries bound the longest group: a tighter bound would synchronise.
        return self.crossattention.attend(
            x, qkv, cu_queries, cu_keys, x.shape[0], longest_keys, key_mask
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        """MLP with residual and norm: `[T, width]` → `[T, width]`."""
        first, second, norm = self.intermediate.dense, self.output.dense, self.output.LayerNorm
        if x.device.type != "cpu" or (self.training and self.output.dropout):
            # A GPU fuses the sum with the norm, a CPU with the GEMM.
            return self.output(ops.linear_gelu(x, first.weight, first.bias), x)
        summed = ops.mlp_residual(x, first.weight, first.bias, second.weight, second.bias, x)
        return ops.layer_norm(summed, norm.weight, norm.bias, norm.eps)

    def short_parts(self) -> ShortParts | None:
        """The parameters of a layer without cross-attention, or None if a module has hooks or another class."""
        # Module attribute lookups would take a third of the time of the GEMMs; dictionaries are faster.
        parts: dict[str, Any] = self._modules
        attention, out = parts["attention"]._modules, parts["output"]._modules
        inner, joined = attention["self"]._modules, attention["output"]._modules
        linears = (
            inner["query"],
            inner["key"],
            joined["dense"],
            parts["intermediate"]._modules["dense"],
            out["dense"],
        )
        norms = joined["LayerNorm"], out["LayerNorm"]
        if {*map(type, linears)} != {nn.Linear} or {*map(type, norms)} != {nn.LayerNorm}:
            return None
        if not without_hooks((attention["output"],), "forward"):
            return None
        eps = norms[0].eps, norms[1].eps
        linears = (*linears[:2], inner["value"], *linears[2:])
        return ShortParts(
            attention["self"].heads, eps, *(each._parameters for each in (*linears, *norms))
        )


class ShortParts(NamedTuple):
    """Sizes of a layer and its parameters by name, to run one short text `[T, width]` without checks."""

    heads: int
    eps: tuple[float, float]
    query: dict[str, Any]
    key: dict[str, Any]
    value: dict[str, Any]
    attended: dict[str, Any]
    first: dict[str, Any]
    second: dict[str, Any]
    norm: dict[str, Any]
    last_norm: dict[str, Any]

    def run_frozen(self, x: Tensor, chosen: gemm.Chosen) -> Tensor:
        """With frozen weights, of which the key's contains the values'; `chosen` are the fastest GEMMs for T."""
        tokens, width = x.shape
        # Concatenating the bias is faster than validating a cached one.
        keys_values = chosen.linear(
            x, self.key["weight"], torch.cat((self.key["bias"], self.value["bias"]))
        )
        k, v = keys_values.view(1, tokens, 2, self.heads, -1).unbind(2)
        q = chosen.linear(x, self.query["weight"], self.query["bias"]).view(
            1, tokens, self.heads, -1
        )
        context = plain_attention(q, k, v, q.shape[-1] ** -0.5).view(tokens, width)
        x = chosen.residual(context, self.attended["weight"], self.attended["bias"], x)
        x = torch.layer_norm(x, (width,), **self.norm, eps=self.eps[0])
        hidden = chosen.gelu(x, self.first["weight"], self.first["bias"])
        x = chosen.residual(hidden, self.second["weight"], self.second["bias"], x)
        return torch.layer_norm(x, (width,), **self.last_norm, eps=self.eps[1])

    def run_int8(self, x: Tensor) -> Tensor:
        """With int8 weights."""
        three, (tokens, width) = (self.query, self.key, self.value), x.shape
        weights, biases = (tuple(own[name] for own in three) for name in ("weight", "bias"))
        qkv = int8.prepared(weights, biases, lambda: concatenated("qkv weight", *weights))
        attended, first, second = (
            int8.prepared((own["weight"],), (own["bias"],), partial(own.__getitem__, "weight"))
            for own in self[5:8]
        )
        q, k, v = qkv(x).view(1, tokens, 3, self.heads, -1).unbind(2)
        context = plain_attention(q, k, v, q.shape[-1] ** -0.5).view(tokens, width)
        x = torch.layer_norm(attended(context, x), (width,), **self.norm, eps=self.eps[0])
        hidden = first(x, gelu=True, dtype=torch.float32)
        x = second(hidden, x, of_gelu=True)
        return torch.layer_norm(x, (width,), **self.last_norm, eps=self.eps[1])


class Embeddings(nn.Module):
    """Word, position and type embeddings, LayerNorm, dropout; on packed tokens."""

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
        """`[P, L]`: real tokens count up from pad + 1, padding is numbered pad (RoBERTa, arXiv 1907.11692)."""
        real = input_ids.ne(self.pad_token_id)
        return real.cumsum(1) * real + self.pad_token_id

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Packed ids `[T]` and position ids `[T]` → `[T, width]`."""
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

    def run_chunked(
        self, run: Callable[[Texts], Tensor], texts: Texts, kind: tuple[Hashable, ...] = ()
    ) -> Tensor:
        """Run `run(texts)` in one chunk per thread if the layers are frozen without hooks; `kind` as in
        `shares.run_chunked`.
        """
        # With few rows, each thread would read all weights by itself.
        if len(texts) < LEAST_TOKENS * torch.get_num_threads() or not self.can_chunk():
            return run(texts)
        return run_chunked(
            run,
            texts,
            (*kind, kind_of(self[0].intermediate.dense.weight), len(self.layer), texts.kind),
        )

    def forward_short(self, x: Tensor, count: int) -> Tensor | None:
        """The first `count` layers on one text `[T, width]`; None unless all are frozen or all are int8."""
        parts = [
            found for number in range(count) if (found := self[number].short_parts()) is not None
        ]
        if not parts or len(parts) < count:
            return None
        # Query to second are the linear layers.
        if all(kind_of(own["weight"]) == "int8" for each in parts for own in each[2:8]):
            first, weights = parts[0], tuple(own["weight"] for own in parts[0][5:8])
            usable = first.last_norm["weight"].dtype == x.dtype and not any(
                weight.is_inference() for weight in weights
            )
            if usable and int8.compiled(len(x), x.dtype, weights):
                for each in parts:
                    x = each.run_int8(x)
                return x
        frozen = ((each.query, each.key, *each[5:8]) for each in parts)
        if not all(gemm.is_frozen(own["weight"]) for layers in frozen for own in layers):
            return None
        chosen = gemm.chosen(parts[0].first["weight"], len(x))
        for each in parts:
            x = each.run_frozen(x, chosen)
        return x

    def can_chunk(self) -> bool:
        """True if the layers are frozen, in inference on a CPU, and have no hooks."""
        return (
            len(self.layer) > 0
            and can_chunk(self[0].intermediate.dense.weight)
            and without_hooks(self.layer, *_METHODS)
        )  # fmt: skip


def initialise_text(module: nn.Module) -> None:
    """RoBERTa's initialisation: normal(0, 0.02) matrices and embeddings, padding row zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
            if part.padding_idx is not None:
                with torch.no_grad():
                    part.weight[part.padding_idx].zero_()


class TextTransformer(nn.Module):
    """Embeddings and layers, under the official name `roberta`; with cross-attention if there is a `memory_width`."""

    def __init__(self, config: XFMConfig, layers: int, memory_width: int | None = None) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack([TransformerLayer(config, memory_width) for _ in range(layers)])


class TextEncoder(nn.Module):
    """Token ids to embeddings, and the masked-language-modelling head."""

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
        """Ids `[P, L]` → packed embeddings `[T, width]`, or `[Q, width]` for Q reads.

        With `first_token_only`, token 0 of every text, `[P, width]` in packed order.
        """
        embeddings = self.roberta.embeddings
        x = embeddings(
            packing.pack(input_ids).long(), packing.pack(embeddings.position_ids(input_ids))
        )
        texts = Texts(x, packing)
        run = partial(self._encode, reads=reads, first_token_only=first_token_only)
        if reads is not None or packing.key_mask is not None:
            return run(texts)
        return self.roberta.encoder.run_chunked(
            run, texts, ("first token",) if first_token_only else ()
        )

    def _encode(
        self, texts: Texts, reads: Reads | None = None, first_token_only: bool = False
    ) -> Tensor:
        x, packing, stack = texts.tokens, texts.sequences, self.roberta.encoder
        if first_token_only:
            reads = Reads.first_tokens(packing)
        # The last layer computes only the reads.
        whole = len(stack) - (reads is not None)
        is_single = packing.key_mask is None and len(packing.cu_seqlens) == 2 and len(x) <= _SHORT
        done = 0
        if is_single and stack.can_chunk() and (short := stack.forward_short(x, whole)) is not None:
            x, done = short, whole
        for number in range(done, len(stack)):
            layer, read = stack[number], reads if number == len(stack) - 1 else None
            x = layer.self_attention(
                x, packing.cu_seqlens, packing.longest, packing.key_mask, reads=read
            )
            x = layer.feed_forward(x)
        # Without layers the reads are not selected yet.
        return x if reads is None or len(stack) else x.index_select(0, reads.rows)
