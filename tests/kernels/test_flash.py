"""The adapter of flash-attn 2, 3 and 4, by modules of their signatures that check what they are given."""

# Operands are one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.kernels import backend, flash, ops, reference
from xfm_fast.kernels.checks import Packed

LENGTHS = ([0, 3, 8], [0, 5, 9])


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float) -> Tensor:
    for tensor in (q, k, v):
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.stride(-1) == 1
        assert tensor.data_ptr() % 16 == 0
        assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:2])
    for offsets in (cu_q, cu_k):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
    assert (max_q, max_k) == (5, 5)
    return reference.varlen_attention(q, k, v, cu_q, cu_k, scale, 0.0, None, None)


def version_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    assert not causal
    assert softmax_scale is not None
    out = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    return out * 0 if dropout_p else out


def version_3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert (seqused_q, seqused_k, causal) == (None, None, False)
    assert softmax_scale is not None
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale), q.new_empty(0)


def version_4(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None, max_seqlen_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    assert qv is None
    assert softmax_scale is not None
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale), None


STUBS = {2: ("flash_attn", version_2), 3: ("flash_attn_interface", version_3), 4: ("flash_attn.cute", version_4)}


@pytest.fixture
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Only these versions can be imported."""
    flash.function.cache_clear()
    for number, (name, function) in STUBS.items():
        module: Any = ModuleType(name)
        if number in request.param:
            module.flash_attn_varlen_func = function
        # As without flash-attn 2: the folder of flash-attn 4 makes it an empty package.
        monkeypatch.setitem(sys.modules, name, None if number == 3 and number not in request.param else module)
    monkeypatch.setattr(backend, "_why_not", lambda name, device, index: None)
    yield request.param
    flash.function.cache_clear()


def packed(**changes: Any) -> Packed:
    offsets = [torch.tensor(values, dtype=torch.int64) for values in LENGTHS]
    return Packed(*offsets, 5, 5, 0.5)._replace(**changes)


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    # Of one projection, with rows that do not begin at multiples of 16 bytes.
    return tuple(torch.randn(8 if n == 0 else 9, 2 * 8 + 3)[:, 3:].view(-1, 2, 8).to(dtype) for n in range(3))


@pytest.mark.parametrize("installed", [[2], [3], [4], [2, 3, 4]], indirect=True, ids=str)
@pytest.mark.parametrize("capability", [8, 9, 10])
def test_every_version_computes_the_reference(installed: list[int], capability: int) -> None:
    given, (q, k, v) = packed(), operands()
    if installed == [3] and capability != 9:
        with pytest.raises(InputError, match="flash-attn"):
            flash.function(capability)
        return
    first = {8: [2, 4], 9: [3, 4, 2], 10: [4, 2]}[capability]
    expected = STUBS[next(n for n in first if n in installed)][1]
    assert flash.function(capability) is expected
    if capability == 8 and installed != [3]:
        truth = reference.varlen_attention(q, k, v, *given[:2], 0.5, 0.0, None, None)
        assert torch.equal(ops.varlen_attention(q, k, v, *given[:4], scale=0.5, backend="flash_attn"), truth)


@pytest.mark.parametrize("installed", [[], [4]], indirect=True, ids=str)
def test_what_is_missing_is_an_error_of_its_own(installed: list[int]) -> None:
    """With flash-attn 4 alone, `flash_attn` is a package without the function."""
    dropped = {"dropout_p": 0.1} if installed else {}
    with pytest.raises(InputError, match="flash-attn"):
        ops.varlen_attention(*operands(), *packed()[:4], backend="flash_attn", **dropped)


@pytest.mark.parametrize("installed", [[2]], indirect=True, ids=str)
def test_arguments_that_it_does_not_have_are_named(installed: list[int]) -> None:
    hidden = torch.ones(9, dtype=torch.bool)
    with pytest.raises(InputError, match="key_mask"):
        ops.varlen_attention(*operands(), *packed()[:4], key_mask=hidden, backend="flash_attn")
    with pytest.raises(InputError, match="float32"):
        ops.varlen_attention(*operands(torch.float32), *packed()[:4], backend="flash_attn")
    assert not ops.varlen_attention(*operands(), *packed()[:4], dropout_p=0.5, backend="flash_attn").any()


@pytest.mark.parametrize("installed", [[2]], indirect=True, ids=str)
@pytest.mark.parametrize("faster", ["forward", "both"])
def test_auto_takes_what_tune_measured(
    installed: list[int], faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.kernels.triton_testing  # noqa: F401  (before Triton is imported, for the interpreter)
    from xfm_fast.kernels import tune
    from xfm_fast.kernels.triton import launch, varlen_attention
    from xfm_fast.kernels.triton.launch import LaunchConfig

    config = LaunchConfig({"HEADS": 2, "BLOCK_M": 16, "BLOCK_N": 16}, 4, 2)
    choices = [
        tune.Choice(kernel, "bf16", 8, config, 2e-5, 3e-5, 0, 1, flash=1e-5 if wins else 1.99e-5)
        for kernel, wins in (("varlen_forward_heads", True), ("varlen_dkdv_short", faster == "both"))
    ]
    path = tune.write(choices, 90, "a GPU", tmp_path)
    row = json.loads(path.read_text())["varlen_forward_heads"]["bf16/8"]
    assert row["backend"] == "flash_attn"
    assert "flash-attn 10.0" in row["measured"]
    monkeypatch.setattr(launch, "_TUNING", tmp_path)
    monkeypatch.setattr(varlen_attention, "architecture", lambda device: 90)
    launch._tuned.cache_clear()
    given, (q, k, _) = packed(), operands()
    found = varlen_attention.tuned_backends(q, k, given, q.dtype, gradient=False)
    assert found == {"flash_attn"}
    found = varlen_attention.tuned_backends(q, k, given, q.dtype, gradient=True)
    assert found == ({"flash_attn"} if faster == "both" else {"flash_attn", "triton"})
    launch._tuned.cache_clear()
