"""The official AdamW with its parameter groups, learning-rate schedule and weight average."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from xfm_fast.errors import ConfigError, InputError
from xfm_fast.kernels import host
from xfm_fast.training.recipe_fields import OptimizerRecipe, ScheduleRecipe

# Wherever they stand in a name: relative_position_bias_table, q_bias and v_bias are not decayed because of "bias";
# fc_norm and layer_norm because of "norm.weight"; the LayerNorms inside MLP heads (itm_head.1.weight) are.
_NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
_TABLE = "relative_position_bias_table"


def optimizer_groups(
    model: nn.Module, recipe: OptimizerRecipe, *, large_lr: Iterable[str]
) -> list[dict[str, Any]]:
    """Non-empty groups {decay, no decay} × {lr, lr·lr_mult}, then position tables if they have their own rate."""
    fast = set(large_lr)
    multiples = {"body": 1.0, "heads": recipe.lr_mult, "tables": recipe.table_lr_mult}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {
        (part, decayed): [] for part in multiples for decayed in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = recipe.decay_all or not any(part in name for part in _NO_DECAY)
            part = "heads" if name.split(".")[0] in fast else "body"
            if recipe.table_lr_mult != 1 and name.endswith(_TABLE):
                part = "tables"
            members[part, decayed].append(parameter)
    groups = [
        {
            "params": parameters,
            "lr": recipe.lr * multiples[part],
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for (part, decayed), parameters in members.items()
        if parameters
    ]
    if not groups:
        raise ConfigError("every parameter of the model is frozen; leave some trainable")
    return groups


class AdamW(Optimizer):
    """AdamW as in transformers 4.12.5, which trained X-FM.

    m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²
    p ← p − lr·√(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε)
    p ← p − lr·wd·p

    `kind="torch"` is the rule of `torch.optim.AdamW`: it decays before the step and adds ε after the bias correction of
    √v. t stays on the host, so a step does not synchronise; each rank updates its own shard. `zero_grad="zeros"` sets
    gradients to zero, not None: parameters without a gradient then keep moving by momentum and decay, as the official
    code does under torch < 2.0.
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
        self.kind, self.gradients_rest = kind, zero_grad == "none"
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Reset gradients; `set_to_none` overrides the constructor's `zero_grad`."""
        to_none = self.gradients_rest if set_to_none is None else set_to_none
        super().zero_grad(set_to_none=to_none)
        if not to_none:
            # After a resume, parameters that were moved before have state but no gradient yet.
            for parameter, state in self.state.items():
                if state and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        states = [self.state[parameter] for parameter in parameters]
        values = [local(parameter) for parameter in parameters]
        moments = Moments(
            gradients=[
                local(parameter.grad) for parameter in parameters if parameter.grad is not None
            ],
            first=[local(state["exp_avg"]) for state in states],
            second=[local(state["exp_avg_sq"]) for state in states],
            steps=[state["step"] for state in states],
        )
        move = adam_in_one_pass if values[0].device.type == "cpu" else adam_in_passes
        decay, corrected = 1 - group["lr"] * group["weight_decay"], self.kind == "torch"
        if corrected and decay != 1:
            torch._foreach_mul_(values, decay)
        move(values, moments, group["lr"], group["betas"], group["eps"], corrected=corrected)
        if not corrected and decay != 1:
            torch._foreach_mul_(values, decay)


def local(tensor: Tensor) -> Tensor:
    """Local shard of a tensor, which is all that elementwise work needs."""
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
    """Adam step in place with foreach ops: six passes, one temporary copy; `corrected` adds ε to the corrected √v."""
    gradients, first, second, steps = moments
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(first, gradients, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, gradients, gradients, value=1 - betas[1])
    denominators = torch._foreach_sqrt(second)
    # One size for each parameter, since not every update reaches all; in fp64, as Python floats would be.
    taken = torch.stack(steps).double()
    corrections = (1 - betas[1] ** taken).sqrt()
    torch._foreach_add_(denominators, (eps * corrections).numpy().tolist() if corrected else eps)
    torch._foreach_addcdiv_(
        values, first, denominators, -lr * corrections / (1 - betas[0] ** taken)
    )


def adam_in_one_pass(
    values: list[Tensor],
    moments: Moments,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    *,
    corrected: bool = False,
) -> None:
    """Adam step with PyTorch's fused kernel, on parameters with equal step counts (ε depends on the step)."""
    alike: dict[int, list[int]] = defaultdict(list)
    for index, taken in enumerate(host.integers(torch.stack(moments.steps).long())):
        alike[taken + 1].append(index)
    for taken, chosen in alike.items():
        gradients, first, second, steps = (
            [column[index] for index in chosen] for column in moments
        )
        adam(
            [values[index] for index in chosen],
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
            eps=eps if corrected else eps / math.sqrt(1 - betas[1] ** taken),
            maximize=False,
        )
    # Unlike other operations in place, the fused ones leave the versions as they are by which cached tensors see a
    # change.
    torch.autograd.graph.increment_version([*values, *moments.first, *moments.second])


def schedule_factor(schedule: ScheduleRecipe, step: int, *, steps: int, lr: float) -> float:
    """Learning-rate factor of a 0-based step; with warm-up the first step has factor 0, as in the official code."""
    warmup = schedule.warmup_steps(steps)
    if step < warmup:
        return step / warmup
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    if schedule.kind == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    floor = schedule.min_lr / lr
    return floor + (1 - floor) * left


class WeightAverage:
    """Exponential moving average of all parameters, in fp32 or wider, sharded like the parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"decay={decay} must lie in (0, 1), e.g. 0.999")
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._averages = {
            name: parameter.detach().to(
                torch.promote_types(parameter.dtype, torch.float32), copy=True
            )
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Update the average; call once per step."""
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().to(average.dtype), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return dict(self._averages)
