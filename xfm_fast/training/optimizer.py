"""The official AdamW with its parameter groups, learning-rate schedule and weight average."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from xfm_fast.errors import ConfigError, InputError
from xfm_fast.kernels import host
from xfm_fast.training.recipe_fields import OptimizerRecipe, ScheduleRecipe

# Anywhere in a name: relative_position_bias_table, q_bias and v_bias are not decayed because of "bias",
# fc_norm and layer_norm because of "norm.weight"; LayerNorms inside MLP heads (itm_head.1.weight) are decayed.
_NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
_TABLE = "relative_position_bias_table"


def optimizer_groups(
    model: nn.Module, recipe: OptimizerRecipe, *, large_lr: Iterable[str]
) -> list[dict[str, Any]]:
    """Group parameters by {decay, no decay} × {lr, lr·lr_mult}, then position tables if their rate differs."""
    fast = set(large_lr)
    rates = {
        "body": recipe.lr,
        "heads": recipe.lr * recipe.lr_mult,
        "tables": recipe.lr * recipe.table_lr_mult,
    }
    members: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = recipe.decay_all or not any(suffix in name for suffix in _NO_DECAY)
            group = "heads" if name.split(".")[0] in fast else "body"
            if recipe.table_lr_mult != 1 and name.endswith(_TABLE):
                group = "tables"
            members[group, decayed].append(parameter)
    groups = [
        {
            "params": members[group, decayed],
            "lr": rate,
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for group, rate in rates.items()
        for decayed in (True, False)
        if members[group, decayed]
    ]
    if not groups:
        raise ConfigError("every parameter of the model is frozen; leave some trainable")
    return groups


class AdamW(Optimizer):
    """AdamW as in transformers 4.12.5, which trained X-FM.

    m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²
    p ← p − lr·√(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε)
    p ← p − lr·wd·p

    `kind="torch"` is the rule of `torch.optim.AdamW`: it decays before the step and adds ε after the bias
    correction of √v. t stays on the host, so a step does not synchronise; each rank updates its shard.
    `zero_grad="zeros"` sets gradients to zero, not None: parameters without a gradient then keep moving
    by momentum and decay, as in the official code under torch < 2.0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        kind: Literal["transformers", "torch"] = "transformers",
        zero_grad: Literal["none", "zeros"] = "none",
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise InputError(
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}: rates must not be negative, eps must "
                "be positive and betas lie in [0, 1)"
            )
        self.kind, self.set_to_none = kind, zero_grad == "none"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Reset gradients; `set_to_none` overrides the constructor's `zero_grad`."""
        to_none = self.set_to_none if set_to_none is None else set_to_none
        super().zero_grad(set_to_none=to_none)
        if not to_none:
            # After a resume, parameters that were moved before have state but no gradient yet.
            for parameter, state in self.state.items():
                if state and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    batches[parameter.device, parameter.dtype].append(parameter)
            for parameters in batches.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        states = [self.state[parameter] for parameter in parameters]
        values = [local(parameter) for parameter in parameters]
        moments = Moments(
            gradients=[local(p.grad) for p in parameters if p.grad is not None],
            first=[local(state["exp_avg"]) for state in states],
            second=[local(state["exp_avg_sq"]) for state in states],
            steps=[state["step"] for state in states],
        )
        step = adam_in_one_pass if values[0].device.type == "cpu" else adam_in_passes
        decay, corrected = 1 - group["lr"] * group["weight_decay"], self.kind == "torch"
        if corrected and decay != 1:
            torch._foreach_mul_(values, decay)
        step(values, moments, group["lr"], group["betas"], group["eps"], corrected=corrected)
        if not corrected and decay != 1:
            torch._foreach_mul_(values, decay)


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, for elementwise work."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Moments(NamedTuple):
    """Gradients and moments of n parameters."""

    gradients: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]
    """Completed steps: fp32 scalars on the host."""


def adam_in_passes(
    values: list[Tensor],
    moments: Moments,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    *,
    corrected: bool = False,
) -> None:
    """Step Adam in place with foreach ops: six passes, one temporary copy.

    `corrected` adds ε to the corrected √v.
    """
    gradients, first, second, steps = moments
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(first, gradients, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, gradients, gradients, value=1 - betas[1])
    denominators = torch._foreach_sqrt(second)
    # One size for each parameter, since not every update reaches all; in fp64, like Python floats.
    counts = torch.stack(steps).double()
    corrections = (1 - betas[1] ** counts).sqrt()
    torch._foreach_add_(denominators, (eps * corrections).numpy().tolist() if corrected else eps)
    sizes = -lr * corrections / (1 - betas[0] ** counts)
    torch._foreach_addcdiv_(values, first, denominators, sizes)


def adam_in_one_pass(
    values: list[Tensor],
    moments: Moments,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    *,
    corrected: bool = False,
) -> None:
    """Step Adam in place with PyTorch's fused kernel, by step count, on which ε depends."""
    indices: dict[int, list[int]] = defaultdict(list)
    for index, count in enumerate(host.integers(torch.stack(moments.steps).long())):
        indices[count + 1].append(index)
    for count, group in indices.items():
        gradients, first, second, steps = ([column[index] for index in group] for column in moments)
        adam(
            [values[index] for index in group],
            gradients,
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=eps if corrected else eps / math.sqrt(1 - betas[1] ** count),
            maximize=False,
        )
    # Unlike other operations in place, fused ones do not advance the versions that the cache watches.
    torch.autograd.graph.increment_version([*values, *moments.first, *moments.second])


def schedule_factor(schedule: ScheduleRecipe, step: int, *, steps: int, lr: float) -> float:
    """Return the learning-rate factor of a 0-based step; with warm-up 0 in the first, as in the official code."""
    warmup = schedule.warmup_steps(steps)
    if step < warmup:
        return step / warmup
    remaining = max(0.0, (steps - step) / max(1, steps - warmup))
    if schedule.kind == "cosine":
        remaining = (1 - math.cos(math.pi * remaining)) / 2
    floor = schedule.min_lr / lr
    return floor + (1 - floor) * remaining


class WeightAverage:
    """Exponential moving average of all parameters, in fp32 or wider, sharded like the parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"decay={decay} must lie in (0, 1), e.g. 0.999")
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._averages: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._averages[name] = parameter.detach().to(dtype, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average; call once per step."""
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().to(average.dtype), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(self._averages)
