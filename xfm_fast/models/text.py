"""The RoBERTa text encoder, on packed tokens: no layer ever sees a padding token."""

from __future__ import annotations

from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.models.heads import LMHead
from xfm_fast.models.layers import Embeddings, LayerStack, TransformerLayer, initialise_text
from xfm_fast.packing import Packing, Reads


class TextTransformer(nn.Module):
    """Embeddings and layers, under the official name `roberta`; with a `memory_width` they attend to a memory too."""

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

    def forward(self, input_ids: Tensor, packing: Packing, *, reads: Reads | None = None) -> Tensor:
        """Ids `[P, L]` → packed embeddings `[T, width]`, or `[Q, width]` where only Q tokens are read."""
        embeddings = self.roberta.embeddings
        x = embeddings(packing.pack(input_ids).long(), packing.pack(embeddings.position_ids(input_ids)))
        stack = self.roberta.encoder
        for number, layer in enumerate(stack):
            read = reads if number == len(stack) - 1 else None
            x = layer.self_attention(x, packing.cu_seqlens, packing.longest, packing.key_mask, reads=read)
            x = layer.feed_forward(x)
        # Without layers nothing has selected the reads yet.
        return x if reads is None or len(stack) else x.index_select(0, reads.rows)
