"""Precision of a model: float dtypes, linear layers in 8 bits, and weights frozen for CPU inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import flags, fp8
from xfm_fast.kernels.flags import EightBits
from xfm_fast.kernels.linear import floating_dtype
from xfm_fast.models import frozen
from xfm_fast.models.text import TransformerLayer
from xfm_fast.models.vision import Block
from xfm_fast.plans.plan import forget

Precision = torch.dtype | EightBits
"""A dtype of the parameters; or linear layers in int8 (CPU) or fp8, and the rest in the fastest float dtype."""
PRECISIONS: dict[str, Precision] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": "int8",
    "fp8": "fp8",
}
"""Names on the command line."""


def float_type(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the floating-point dtype of a precision; int8 and fp8 apply to linear layers only.

    Raises `UnavailableError` for an 8-bit type that the device lacks, and `InputError` for an
    unknown precision.
    """
    if isinstance(precision, torch.dtype):
        return precision
    return floating_dtype(precision, device) or torch.float32


class PrecisionMixin(nn.Module):
    """Conversion of a model's parameters, in place."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def cast(self, precision: Precision) -> Self:
        """Convert the parameters, in place; for int8 and fp8 to the fastest dtype, then `quantise`."""
        model = self.to(float_type(precision, self.device))
        return model if isinstance(precision, torch.dtype) else model.quantise(precision)

    def quantise(
        self,
        kind: EightBits = "int8",
        agreement: Callable[[], float] | None = None,
        *,
        least: float = 0.97,
    ) -> Self:
        """Run the linear layers of all blocks in 8 bits; in place.

        Weights are quantised once per output channel, activations per token at run time. Patch
        embedding, embeddings, attention, norms and heads keep their dtype. The original parameters
        stay beneath, so the model can be saved, trained and dequantised as before.

        Args:
            kind: "int8" on a CPU, for inference; "fp8" on a GPU of compute capability 8.9 or newer,
                for inference only. A CPU emulates fp8, slowly, to show its effect on results. A
                model in fp8 may be moved; a model in int8 computes in floating point on a GPU.
            agreement: function that scores this model's results on your data against those in
                floating point, as a cosine or a share of equal rankings. While the score is below
                `least`, the blocks that cost most of it return to floating point. It is called at
                most twice per block.
            least: minimum agreement.

        Raises:
            UnavailableError: this processor or GPU has no fast GEMMs of that kind.
            InputError: the model is quantised already, frozen, or in a dtype without such GEMMs; or
                no block reaches `least`, and the model stays in floating point.
        """
        if self.quantised:
            raise InputError(
                f"the model is in {self.quantised} already; call dequantise() to return to floating point"
            )
        if frozen.is_frozen(self):
            raise InputError(
                f"the model is frozen and {kind} needs other weights; call unfreeze() first"
            )
        floating_dtype(kind, self.device)
        dtypes = [torch.float32, torch.bfloat16]
        blocks = self._weights_by_block()
        if kind == "fp8":
            dtypes.append(torch.float16)
            blocks = [[weight for weight in block if fp8.fits(weight)] for block in blocks]
        if self.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise InputError(
                f"{kind} needs activations of {names}, not {self.dtype}; convert the model first"
            )
        flags.mark((weight for block in blocks for weight in block), kind)
        if kind == "fp8":
            flags.mark(self._block_weights(nn.LayerNorm), kind)
        if agreement is not None:
            exempt = flags.keep_within(agreement, blocks, kind, least)
            if exempt == len(blocks):
                self.dequantise()
                raise InputError(
                    f"no block reaches agreement() {least} in {kind}; lower least, or compare with floating point"
                )
        return self

    def dequantise(self) -> Self:
        """Undo `quantise`, in place; a model in floating point stays unchanged."""
        for module in self.modules():
            forget(module)
        flags.unmark([*self._block_weights(), *self._block_weights(nn.LayerNorm)])
        return self

    @property
    def quantised(self) -> EightBits | None:
        """The 8-bit format of the blocks, or None for a model in floating point."""
        for weight in self._block_weights():
            if (kind := flags.kind_of(weight)) is not None:
                return kind
        return None

    def _block_weights(self, layer: type[nn.Linear | nn.LayerNorm] = nn.Linear) -> list[Tensor]:
        return [weight for block in self._weights_by_block(layer) for weight in block]

    def _weights_by_block(
        self, layer: type[nn.Linear | nn.LayerNorm] = nn.Linear
    ) -> list[list[Tensor]]:
        blocks = (block for block in self.modules() if isinstance(block, Block | TransformerLayer))
        return [
            [module.weight for module in block.modules() if isinstance(module, layer)]
            for block in blocks
        ]

    def freeze(self) -> Self:
        """Convert weights to the CPU's fastest GEMM layout, in place and without extra memory.

        For inference. The gain is largest for few tokens, where most of the time is spent reading
        weights. State dicts and `save_pretrained` are the same to the bit; training, autocast,
        compilers and exports need `unfreeze` first. Moving or converting the model unfreezes it.

        Returns:
            The model.

        Raises:
            InputError: the model is not on a CPU, not in float32 or bfloat16, in int8, or in
                training mode.
        """
        if self.quantised:
            raise InputError(f"the model is in {self.quantised}; call dequantise() before freeze()")
        frozen.freeze(self)
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`."""
        frozen.unfreeze(self)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training mode or, with False, evaluation mode.

        Raises:
            InputError: training mode of a frozen model.
        """
        if mode and frozen.is_frozen(self):
            raise InputError("the model is frozen for inference; call unfreeze() to train it")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moving or converting needs the original weights.
        frozen.unfreeze(self)
        with flags.keep_fp8_flags(self):
            return super()._apply(fn, recurse)
