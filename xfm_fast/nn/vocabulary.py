"""The loss of a language model over its vocabulary, whose logits never exist in full."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import ops


class VocabularyLoss(nn.Module):
    """Mean cross-entropy of `hidden Wᵀ + b` over the tokens that count, in chunks.

    Example, tied to the embeddings of the model:
        >>> loss = VocabularyLoss(768, 50265, weight=model.word_embeddings.weight)
        >>> loss(hidden, labels).backward()

    Args:
        width: of the hidden states.
        vocabulary: number of words.
        weight: `[vocabulary, width]` parameter to share; by default one of its own.
        bias: whether every word has one.
        ignore_index: label of tokens that do not count.
        label_smoothing: share of the target probability that is spread evenly over the vocabulary.

    Raises:
        InputError: a weight of another shape, or a smoothing outside [0, 1].
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        *,
        weight: nn.Parameter | None = None,
        bias: bool = True,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (vocabulary, width):
            raise InputError(f"weight is {[*weight.shape]}; for this vocabulary it must be [{vocabulary}, {width}]")
        if not 0 <= label_smoothing <= 1:
            raise InputError(f"label_smoothing={label_smoothing} lies outside [0, 1]")
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.weight = nn.Parameter(torch.empty(vocabulary, width)) if weight is None else weight
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if bias else None
        if weight is None:
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The loss: a scalar, at least fp32; 0 where no token counts.

        Args:
            hidden: `[..., width]`.
            target: `[...]` integers below the vocabulary, or `ignore_index`.
        """
        return ops.linear_cross_entropy(
            hidden,
            self.weight,
            self.bias,
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def log_likelihood(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Log-probability of every target, to rank texts by: `[...]`, 0 where it is `ignore_index`."""
        return ops.token_log_likelihood(hidden, self.weight, self.bias, target, ignore_index=self.ignore_index)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all words, for generation: `[..., width]` → `[..., vocabulary]`."""
        return ops.linear(hidden, self.weight, self.bias)

    def extra_repr(self) -> str:
        vocabulary, width = self.weight.shape
        return f"{width}, {vocabulary}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
