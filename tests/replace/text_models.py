"""Small text models of transformers with random weights, batches for them, and the comparison of two copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from xfm_fast import accelerate

Batch = dict[str, Any]
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 63,
    "vocab_size": 111,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LENGTHS = (11, 3, 6, 1, 8)
TRANSFORMERS = int(transformers.__version__.split(".")[0])
# The causal masks of transformers 4 overflow in float64.
CAUSAL_DTYPE, CAUSAL_BOUND = (torch.float64, 1e-12) if TRANSFORMERS > 4 else (torch.float32, 1e-5)


def make(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes: Any) -> Any:
    """A model by its class name, in training mode (without dropout there is no other difference)."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    # In transformers 4 some models have no choice of attention implementations.
    attention = attention if kind._supports_sdpa else "eager"
    config = kind.config_class(**SIZES | changes, attn_implementation=attention)
    model = kind(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Freshly made norms and biases are ones and zeros, which would hide an exchange of the two.
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(padding: str = "right", *, labels: bool = False) -> Batch:
    """Ids and mask of texts of `LENGTHS`."""
    generator = torch.Generator().manual_seed(1)
    longest = max(LENGTHS)
    places = torch.arange(longest)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = {"right": places < lengths, "left": places >= longest - lengths}.get(padding)
    if mask is None:
        mask = torch.rand(len(LENGTHS), longest, generator=generator) < 0.6
        mask[:, 4] = True
    ids = torch.randint(2, 111, mask.shape, generator=generator)
    made: Batch = {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}
    if labels:
        chosen = mask & (torch.rand(mask.shape, generator=generator) < 0.4)
        made["labels"] = torch.where(chosen, ids, -100)
    return made


def real(values: Tensor, mask: Tensor | None) -> Tensor:
    """Outputs at real tokens, where there is one for each token."""
    return values if mask is None or values.shape[: mask.ndim] != mask.shape else values[mask.bool()]


def assert_equal(
    original: nn.Module, fast: nn.Module, given: Batch, bound: float = 1e-12, only_real: bool = False
) -> None:
    """Outputs by name and gradients of every parameter, relative to the largest value of each."""
    mask = given.get("attention_mask") if only_real else None
    sides = []
    for model in (original, fast):
        model.zero_grad(set_to_none=True)
        made = model(**given)
        outputs = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        generator = torch.Generator().manual_seed(2)
        total = torch.zeros((), dtype=torch.float64)
        for value in outputs.values():
            seen = real(value, mask).double()
            total = total + (seen * torch.randn(seen.shape, generator=generator, dtype=torch.float64)).sum()
        total.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        sides.append(({name: real(value, mask).detach() for name, value in outputs.items()}, gradients))
    for wanted, found in zip(*sides, strict=True):
        assert wanted.keys() == found.keys()
        largest = max(float(value.abs().max()) for value in wanted.values() if value is not None)
        for name, value in wanted.items():
            other = found[name]
            if value is None or other is None:
                assert value is None or not value.any(), name
                assert other is None or not other.any(), name
                continue
            # The gradient of a key's bias is zero but for rounding.
            scale = max(float(value.abs().max()), 0.05 * largest)
            assert float((other - value).abs().max()) <= bound * scale, name


def copies(model: Any) -> tuple[Any, Any]:
    """A model and its twin."""
    return model, copy.deepcopy(model)


def with_fused_copy(model: Any, **options: Any) -> tuple[Any, Any]:
    """A model and its accelerated twin."""
    fast = copy.deepcopy(model)
    accelerate(fast, **options)
    return model, fast
