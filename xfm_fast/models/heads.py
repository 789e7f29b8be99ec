"""The heads on top of the encoders."""

from __future__ import annotations

from torch import Tensor, nn

from xfm_fast.kernels import ops


class MLPHead(nn.Sequential):
    """Linear(d, 2d) · LayerNorm · GELU · Linear(2d, outputs): matching, boxes, classification."""

    def __init__(self, inputs: int, outputs: int, eps: float = 1e-5) -> None:
        super().__init__(
            nn.Linear(inputs, 2 * inputs), nn.LayerNorm(2 * inputs, eps=eps), nn.GELU(), nn.Linear(2 * inputs, outputs)
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
        return ops.layer_norm(activated, self.layer_norm.weight, self.layer_norm.bias, self.layer_norm.eps)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Logits over the vocabulary: `[..., width]` → `[..., vocabulary]`."""
        return ops.linear(self.transform(hidden), word_embeddings, self.bias)
