"""The masked-language head of BERT and RoBERTa, whoever wrote it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from xfm_fast.kernels import ops
from xfm_fast.replace.packed_layers import is_erf_gelu
from xfm_fast.replace.swapping import CalledByName, observed


class VocabularyHead(CalledByName):
    """Dense, GELU, LayerNorm and the product with the vocabulary."""

    bypassed: ClassVar[Any] = {
        "dense": nn.Linear,
        "layer_norm": nn.LayerNorm,
        "transform.dense": nn.Linear,
        "transform.LayerNorm": nn.LayerNorm,
        "decoder": nn.Linear,
    }

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        features = self.arguments(args, kwargs).get(self.names[0])
        if features is None or not self.intact():
            return super().forward(*args, **kwargs)
        with self.settings.own_types(features.device):
            return self.logits(self.transformed(features))

    def intact(self) -> bool:
        transform = self._modules.get("transform")
        return super().intact() and (transform is None or not observed(transform))

    def transformed(self, features: Tensor) -> Tensor:
        """`[..., width]` → what meets the vocabulary."""
        module, settings = self._parts(), self.settings
        dense, norm, activation = module
        x = settings.operand(features)
        stored = settings.affine(dense.weight, dense.bias)
        if activation is None or is_erf_gelu(activation):
            x = ops.linear_gelu(x, *stored, backend=settings.backend)
        else:
            x = activation(ops.linear(x, *stored, backend=settings.backend))
        scale, shift = settings.affine(norm.weight, norm.bias)
        return ops.layer_norm(x, scale.to(x.dtype), shift.to(x.dtype), norm.eps, backend=settings.backend)

    def vocabulary(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, width]` and bias `[V]` in the type that is computed in."""
        module: Any = self
        return self.settings.affine(module.decoder.weight, module.decoder.bias)

    def logits(self, transformed: Tensor) -> Tensor:
        """`[..., width]` → `[..., V]`."""
        weight, bias = self.vocabulary()
        return ops.linear(transformed, weight, bias, backend=self.settings.backend)

    def _parts(self) -> tuple[Any, Any, Any]:
        """Product, norm and activation; RoBERTa's head calls the function, BERT's keeps a module."""
        module: Any = self
        if "transform" in self._modules:
            return module.transform.dense, module.transform.LayerNorm, module.transform.transform_act_fn
        return module.dense, module.layer_norm, None
