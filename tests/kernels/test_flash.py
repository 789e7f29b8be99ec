"""The adapter of flash-attn 2, 3 and 4, by modules of their signatures that check what they are given."""

# Operands are one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.kernels.triton_testing  # noqa: F401  (before Triton is imported, for the interpreter)
from xfm_fast.benchmarks.work import kernels
from xfm_fast.errors import InputError
from xfm_fast.kernels import backend, flash, ops, reference, tune
from xfm_fast.kernels.checks import Packed
from xfm_fast.kernels.triton import launch, varlen_attention
from xfm_fast.kernels.triton.launch import LaunchConfig

REFERENCE = {
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "deterministic",
    "cu_seqlens_q",
    "cu_seqlens_k",
}


def attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    assert given.keys() == REFERENCE
    for tensor in (q, k, v):
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.stride(-1) == 1
        assert not any(
            start % 16
            for start in (tensor.data_ptr(), *(2 * stride for stride in tensor.stride()[:2]))
        )
    offsets = given["cu_seqlens_q"], given["cu_seqlens_k"]
    assert all(values.dtype == torch.int32 and values.is_contiguous() for values in offsets)
    return reference.varlen_attention(q, k, v, *offsets, given["softmax_scale"], 0.0, None, None)


def version_2(*operands: Tensor, dropout_p: float = 0.0, **given: Any) -> Tensor:
    out = attend(*operands, **given)
    return out * 0 if dropout_p else out


def version_3(*operands: Tensor, **given: Any) -> tuple[Tensor, None]:
    """Versions 3 and 4 return the logsumexp too, and have no dropout."""
    return attend(*operands, **given), None


STUBS = {
    2: ("flash_attn", version_2),
    3: ("flash_attn_interface", version_3),
    4: ("flash_attn.cute", version_3),
}
# By the first number of the compute capability, the fastest first.
ORDER = {8: [2, 4], 9: [3, 4, 2], 10: [4, 2]}


@pytest.fixture
def installed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[int]]:
    """Only these versions can be imported."""
    flash.function.cache_clear()
    for number, (name, function) in STUBS.items():
        module: Any = ModuleType(name)
        if number in request.param:
            module.flash_attn_varlen_func = function
        # As without flash-attn 2: the folder of flash-attn 4 makes it an empty package.
        monkeypatch.setitem(
            sys.modules, name, None if number == 3 and number not in request.param else module
        )
    monkeypatch.setattr(backend, "_why_not", lambda name, device, index: None)
    yield request.param
    flash.function.cache_clear()


OFFSETS = torch.tensor([0, 3, 8]), torch.tensor([0, 5, 9])
PACKED = Packed(*OFFSETS, max_q=5, max_k=5, scale=0.5, dropout_p=0.0, seed=None, key_mask=None)


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    # Of one projection, with rows that do not begin at multiples of 16 bytes.
    return tuple(
        torch.randn(8 if n == 0 else 9, 2 * 8 + 3)[:, 3:].view(-1, 2, 8).to(dtype) for n in range(3)
    )


def run(*given: Tensor, **options: Any) -> Tensor:
    options = {"backend": "flash_attn"} | options
    return ops.varlen_attention(*given, *OFFSETS, 5, 5, scale=0.5, **options)


@pytest.mark.parametrize("installed", [[2], [4], [2, 3, 4]], indirect=True, ids=str)
def test_every_version_computes_the_reference(installed: list[int]) -> None:
    for capability, order in ORDER.items():
        first = next(number for number in order if number in installed)
        assert flash.function(capability) is STUBS[first][1]
    given = operands()
    assert torch.equal(
        run(*given), reference.varlen_attention(*given, *OFFSETS, 0.5, 0.0, None, None)
    )


@pytest.mark.parametrize("installed", [[], [2], [4]], indirect=True, ids=str)
def test_the_benchmark_sets_us_beside_the_version_that_is_there(
    installed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    ((name, call),) = kernels._flash_attention(run, torch.device("cuda")).items()
    if not installed:
        assert name == "flash-attn"
        assert "flash_attn.cute: " in str(call)
        return
    assert name == f"flash-attn {installed[0]}"
    assert callable(call)
    given = operands()
    assert torch.equal(call(*given), run(*given))


@pytest.mark.parametrize("installed", [[], [4]], indirect=True, ids=str)
def test_what_is_missing_is_an_error_of_its_own(installed: list[int]) -> None:
    """With flash-attn 4 only, `flash_attn` is a package without the function."""
    with pytest.raises(InputError, match="flash-attn"):
        run(*operands(), dropout_p=0.1 if installed else 0.0)


@pytest.mark.parametrize("installed", [[2]], indirect=True, ids=str)
@pytest.mark.usefixtures("installed")
def test_arguments_that_it_does_not_have_are_named() -> None:
    with pytest.raises(InputError, match="key_mask"):
        run(*operands(), key_mask=torch.ones(9, dtype=torch.bool))
    with pytest.raises(InputError, match="float32"):
        run(*operands(torch.float32))
    assert not run(*operands(), dropout_p=0.5).any()


@pytest.mark.parametrize("faster", ["forward", "both"])
def test_auto_takes_what_tune_measured(
    faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LaunchConfig({"HEADS": 2, "BLOCK_M": 16, "BLOCK_N": 16}, 4, 2)
    choices = [
        tune.Choice(kernel, "bf16", 8, config, 2e-5, 3e-5, 0, 1, flash=1e-5 if wins else 1.99e-5)
        for kernel, wins in (
            ("varlen_forward_heads", True),
            ("varlen_dkdv_short", faster == "both"),
        )
    ]
    tune.write(choices, 90, "a GPU", tmp_path)
    monkeypatch.setattr(launch, "_TUNING", tmp_path)
    monkeypatch.setattr(varlen_attention, "architecture", lambda device: 90)
    launch._tuned.cache_clear()
    q, k, _ = operands()
    found = [
        varlen_attention.tuned_backends(q, k, PACKED, q.dtype, gradient=gradient)
        for gradient in (False, True)
    ]
    launch._tuned.cache_clear()
    assert found == [
        {"flash_attn"},
        {"flash_attn"} if faster == "both" else {"flash_attn", "triton"},
    ]
