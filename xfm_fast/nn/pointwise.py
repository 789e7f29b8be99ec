"""Modules that take every token alone: residual and norm in one pass, the MLP, and the loss over a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.nn.attention import check_probability


class AddLayerNorm(nn.Module):
    """Residual sum and LayerNorm in one pass: `summed = residual + γ · dropout(x)`, and its LayerNorm.

    In a post-norm layer the norm goes on; in a pre-norm layer the norm enters the next branch and the sum goes on.

    Example:
        >>> close = AddLayerNorm(768, dropout=0.1)
        >>> normed, summed = close(branch, residual)

    Args:
        width: of the last dimension.
        eps: added to the variance.
        dropout: probability of zeroing an element of the branch in training.
        layer_scale: initial value of a learned factor per channel (LayerScale, arXiv 2103.17239); None for no factor.

    Raises:
        InputError: a dropout outside [0, 1).
    """

    def __init__(
        self, width: int, eps: float = 1e-5, *, dropout: float = 0.0, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        check_probability(dropout)
        self.eps = eps
        self.dropout = dropout
        self.layer_scale = layer_scale
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.gamma = None if layer_scale is None else nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The norm as PyTorch starts it, the factor at `layer_scale`."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.gamma is not None and self.layer_scale is not None:
            nn.init.constant_(self.gamma, self.layer_scale)

    def forward(self, x: Tensor, residual: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add and normalise.

        Args:
            x: `[..., width]`, the branch.
            residual: like x; may be of a wider type, as under autocast.
            row_scale: `[B]`, one factor per entry of the first dimension: stochastic depth.

        Returns:
            (normed, summed), both like x and as wide as the wider of the two.
        """
        return ops.add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            self.eps,
            gamma=self.gamma,
            row_scale=row_scale,
            dropout_p=self.dropout if self.training else 0.0,
            wide=True,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, dropout={self.dropout}, layer_scale={self.layer_scale}"


class GeluMLP(nn.Module):
    """`dropout(gelu(x W1ᵀ + b1) W2ᵀ + b2)` with the erf form of GELU, alone or added to a residual.

    Example:
        >>> mlp = GeluMLP(768, 3072)
        >>> x = mlp(norm(x), x)

    Args:
        width: of input and output.
        hidden: of the layer between.
        dropout: probability of zeroing an element of the result in training.
        layer_scale: initial value of a learned factor per channel; None for no factor.

    Raises:
        InputError: a dropout outside [0, 1).
    """

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0, layer_scale: float | None = None) -> None:
        super().__init__()
        check_probability(dropout)
        self.dropout = dropout
        self.layer_scale = layer_scale
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: normal(0, 0.02) matrices, no bias; the factor at `layer_scale`."""
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.gamma is not None and self.layer_scale is not None:
            nn.init.constant_(self.gamma, self.layer_scale)

    def forward(self, x: Tensor, residual: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
        """`[..., width]` → `[..., width]`.

        Args:
            x: `[..., width]`.
            residual: like x, to be added to; None for the branch alone.
            row_scale: `[B]`, one factor per entry of the first dimension: stochastic depth.

        Raises:
            InputError: a row_scale without a residual.
        """
        first, second = (self.fc1.weight, self.fc1.bias), (self.fc2.weight, self.fc2.bias)
        dropout_p = self.dropout if self.training else 0.0
        if residual is not None:
            return ops.mlp_residual(
                x, *first, *second, residual, gamma=self.gamma, row_scale=row_scale, dropout_p=dropout_p
            )
        if row_scale is not None:
            raise InputError("row_scale drops whole branches of a residual; give the residual too")
        out = ops.linear(ops.linear_gelu(x, *first), *second)
        out = nn.functional.dropout(out, dropout_p) if dropout_p else out
        return out if self.gamma is None else self.gamma * out

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, layer_scale={self.layer_scale}"


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
