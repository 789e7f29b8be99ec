"""Norms of gradients, parameters and updates: of the whole model and of each encoder, and clipping by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ENCODERS = ("vision_encoder", "text_encoder", "fusion_encoder")


class ModelNorms:
    """Norms over the trainable parameters of a model; nothing here waits for the device.

    With FSDP every process norms its own shards, and the squares are summed over processes.

    Args:
        model: whose parameters count; as they are sharded when this is made.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters)
        # What is not sharded is the same on every process and counts once.
        self._counted = torch.tensor(
            [isinstance(p, DTensor) or not self.sharded or dist.get_rank() == 0 for p in self.parameters]
        )
        first = [name.split(".")[0] for name in self.names]
        self._parts = {"all": torch.arange(len(first))} | {
            encoder: torch.tensor([i for i, part in enumerate(first) if part == encoder])
            for encoder in ENCODERS
            if encoder in first
        }

    def gradients(self) -> tuple[list[int], Tensor]:
        """Which parameters have a gradient, and the norm of each."""
        having = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        return having, self._each([local(self.parameters[i].grad) for i in having], having)

    def clip_(self, norm: Tensor, limit: float) -> None:
        """Scale all gradients, whose norm is given, by `limit / norm` where that is below one."""
        factor = (limit / (norm + 1e-6)).clamp_(max=1.0)
        if norm.device.type == "cpu" and factor == 1:
            return
        gradients = [local(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def copy(self) -> list[Tensor]:
        """The parameters of now, for `updates` later."""
        return [local(parameter).detach().clone() for parameter in self.parameters]

    def by_part(self, norms: Tensor, having: Sequence[int] | None = None) -> dict[str, Tensor]:
        """`all`, and each encoder: the norm of norms, of the parameters in `having` (by default of every one)."""
        full = norms
        if having is not None and len(having) < len(self.parameters):
            full = norms.new_zeros(len(self.parameters))
            full[torch.tensor(having, device=norms.device, dtype=torch.long)] = norms
        return {part: full[index.to(full.device)].norm() for part, index in self._parts.items()}

    def values(self) -> dict[str, Tensor]:
        """Norms of the parameters by part."""
        return self.by_part(self._each([local(parameter).detach() for parameter in self.parameters]))

    def updates(self, before: Sequence[Tensor]) -> dict[str, Tensor]:
        """Norms of what was added to the parameters since `copy`, by part."""
        now = [local(parameter).detach() for parameter in self.parameters]
        return self.by_part(self._each([*torch._foreach_sub(now, list(before))]))

    def _each(self, tensors: list[Tensor], having: Sequence[int] | None = None) -> Tensor:
        if not tensors:
            return torch.zeros(0)
        norms = torch.stack(torch._foreach_norm(tensors))
        if self.sharded:
            parts = norms.square() * (self._counted if having is None else self._counted[having]).to(norms)
            dist.all_reduce(parts)
            norms = parts.sqrt_()
        return norms


def local(tensor: Tensor | None) -> Tensor:
    """What this process holds of a tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
