"""The embeddings of BERT and RoBERTa, whoever wrote them: word, position and type, and the LayerNorm behind."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import host, ops
from xfm_fast.replace.swapping import CalledByName


class FusedEmbeddings(CalledByName):
    """Word, position and type embeddings with their LayerNorm in one pass."""

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
        plain = call.get("inputs_embeds") is None and _all_first(call.get("token_type_ids"))
        if tokens is None or not plain or not isinstance(past, int) or past or not self.intact() or not self._exact():
            return super().forward(*args, **kwargs)
        positions = call.get("position_ids")
        if positions is None:
            positions = default_positions(self, tokens)
        with self.settings.own_types(tokens.device):
            return self.embed(tokens, positions.expand(tokens.shape))

    def _exact(self) -> bool:
        """The operation leaves the same row of both tables without gradient, and this is not BERT's way."""
        module: Any = self
        tables = (module.word_embeddings, module.position_embeddings)
        if any(table.max_norm is not None or table.scale_grad_by_freq or table.sparse for table in tables):
            return False
        return not torch.is_grad_enabled() or tables[0].padding_idx == tables[1].padding_idx

    def embed(
        self, tokens: Tensor | None, positions: Tensor, types: Tensor | None = None, embeds: Tensor | None = None
    ) -> Tensor:
        """Ids, or word embeddings `embeds`, of any shape → embeddings, normalised and dropped out."""
        module: Any = self
        table, norm = getattr(module, "token_type_embeddings", None), module.LayerNorm
        word, position = module.word_embeddings, module.position_embeddings
        if embeds is None and types is None and self._exact():
            assert tokens is not None
            row = torch.zeros_like(norm.weight) if table is None else table.weight[0]
            normed = ops.embed_layer_norm(
                tokens,
                positions,
                word.weight,
                position.weight,
                row,
                norm.weight,
                norm.bias,
                norm.eps,
                padding_idx=word.padding_idx,
                backend=self.settings.backend,
            )
        else:
            summed = word(tokens) if embeds is None else embeds
            if table is not None:
                summed = summed + (table.weight[0] if types is None else table(types))
            summed = summed + position(positions)
            normed = F.layer_norm(summed, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return module.dropout(normed)


def _all_first(types: Tensor | None) -> bool:
    """Whether every token is of the first type. On an accelerator a look would wait, so there only None is known."""
    if types is None:
        return True
    return types.device.type == "cpu" and not torch.compiler.is_compiling() and not host.any_true(types.ne(0))


def default_positions(embeddings: Any, tokens: Tensor) -> Tensor:
    """`[P, L]` or `[1, L]`: those that BERT counts by place, or RoBERTa by tokens that are no padding."""
    pad = getattr(embeddings, "padding_idx", None)
    if pad is None:
        return embeddings.position_ids[:, : tokens.shape[1]]
    real = tokens.ne(pad)
    return real.cumsum(1) * real + pad
