"""Every CPU implementation, chosen here or not; the choice between them; slices, dropout masks and kept memory."""

# Operations take the arguments of their case by name, which no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import deterministic_algorithms
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.cases import assert_attention_gradients, plain_attention
from tests.kernels.conftest import compared, each_library
from xfm_fast.errors import InputError
from xfm_fast.kernels import reference
from xfm_fast.kernels.cpu import attention, gemm, llvm, selection, workspace
from xfm_fast.kernels.cpu.selection import RACES, Selection, _selections
from xfm_fast.kernels.cpu.workspace import Dropout

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def usable(operation: str, name: str, dtype: torch.dtype) -> bool:
    """Whether this processor and this PyTorch can run an implementation."""
    return name not in compared(operation, RACES[operation], dtype).rejected


# (batch, queries, keys, heads, width): odd sizes, several biases for a batch, more rows than a tile holds.
SHAPES = [(2, 2, 5, 3, 16), (4, 40, 40, 2, 64), (1, 1100, 600, 3, 16)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", attention._ALL)
@torch.inference_mode()
def test_attention(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, queries, keys, heads, width = shape
    q = torch.randn(batch, heads, queries, width).to(dtype).transpose(1, 2)
    k, v = torch.randn(batch, keys, 2, heads, width).to(dtype).unbind(2)
    biases: list[Tensor | None] = [None, torch.randn(1, heads, queries, keys).to(dtype)]
    if batch == 4:
        for shape in ((4, 1, 1, keys), (2, 1, queries, keys)):
            mask = torch.zeros(shape).masked_fill_(torch.rand(shape) < 0.4, -torch.inf)
            mask[..., 0] = 0
            biases.append(mask.to(dtype))
    for bias in biases:
        if usable("attention" if bias is None else "biased attention", name, dtype):
            found = attention._ALL[name](q, k, v, 0.3, bias)
            assert found.is_contiguous()
            assert_as_accurate(found, plain_attention, q, k, v, 0.3, bias)


@each_dtype
@pytest.mark.parametrize("name", [name for name in attention._ALL if name not in ("aten", "tiled")])
@torch.inference_mode()
def test_powers_out_of_range_are_left_to_the_softmax(name: str, dtype: torch.dtype) -> None:
    """Scores of hundreds, both ways; a query that sees no key; and inputs that are no numbers."""
    if not usable("attention", name, dtype):
        pytest.skip(f"{name} is rejected here")
    q, k, v = torch.randn(2, 20, 3, 2, 16).to(dtype).unbind(2)
    low = torch.full((1, 1, 1, 20), -300.0).to(dtype)
    for scale, bias in ((100.0, None), (-100.0, None), (0.3, low)):
        found = attention._ALL[name](q, k, v, scale, bias)
        # A rounded score of hundreds moves a weight by several times.
        assert_as_accurate(found, plain_attention, q, k, v, scale, bias, ceiling=1.0)
    hidden = torch.zeros(1, 1, 20, 20).to(dtype)
    hidden[..., 4, :] = -torch.inf
    found = attention._ALL[name](q, k, v, 0.3, hidden)
    assert found[:, 4].isnan().all()
    assert found[:, :4].isfinite().all()
    assert attention._ALL[name](q * torch.nan, k, v, 0.3, None).isnan().all()


@each_dtype
@pytest.mark.parametrize(("shape", "tile_bytes"), [(SHAPES[0], 100), (SHAPES[1], 3000)])
@torch.no_grad()
def test_gradients_of_tiles(
    shape: tuple[int, ...], tile_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of one head of several entries, and of a few rows; whatever scratch memory held before."""
    monkeypatch.setattr(attention, "_TILE_BYTES", tile_bytes)
    batch, queries, keys, heads, width = shape
    q, dout = torch.randn(2, batch, heads, queries, width).to(dtype).transpose(2, 3)
    k, v = torch.randn(batch, keys, 2, heads, width).to(dtype).unbind(2)
    bias = torch.randn(1, heads, queries, keys).to(dtype)
    for buffer in getattr(workspace._local, "buffers", {}).values():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    found = attention.tiled_attention_backward(dout, q, k, v, 0.3, bias, bias_gradient=True)
    assert_attention_gradients(found, dout, q, k, v, 0.3, bias)


def test_position_bias_and_its_gradient() -> None:
    window, rows, tokens = (3, 5), 48, 16
    table = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    expected = reference.position_bias(table, window)
    # The largest of a query is subtracted, which no softmax sees.
    shifted = expected - expected.amax(-1, keepdim=True)
    assert torch.equal(attention.position_bias(table.detach(), window), shifted)
    dbias = torch.randn(3, tokens, tokens, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, table, dbias)
    torch.testing.assert_close(attention.table_gradient(dbias, window, rows), gradient)


@each_dtype
@torch.no_grad()
def test_every_implementation_of_linear_layers_takes_odd_sizes(dtype: torch.dtype) -> None:
    rows, inputs, outputs = 5, 7, 3
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs), (rows, outputs))
    x, weight, bias, residual, dout = (torch.randn(s).to(dtype) for s in shapes)
    cases: list[tuple[str, Callable[..., Tensor], tuple[Tensor | None, ...]]] = [
        *(("linear", reference.linear, (x, weight, b)) for b in (bias, None)),
        ("linear_gelu", reference.linear_gelu, (x, weight, bias)),
        (
            "linear_residual",
            lambda *given: reference.linear_residual(*given, None, None),
            (x, weight, bias, residual),
        ),
        ("trained linear", reference.linear, (x, weight, bias)),
        ("input gradient", lambda dout, weight: dout @ weight, (dout, weight)),
        ("weight gradient", lambda dout, x: dout.t() @ x, (dout.t().contiguous().t(), x)),
    ]
    for operation, definition, arguments in cases:
        for name, run in RACES[operation].candidates.items():
            if usable(operation, name, dtype):
                assert_as_accurate(run(*arguments), definition, *arguments)


@each_dtype
@pytest.mark.parametrize("operation", ["linear_gelu", "linear_gelu of few rows"])
@torch.inference_mode()
def test_gelu_of_what_is_not_finite(operation: str, dtype: torch.dtype) -> None:
    """As PyTorch has it, whichever library runs: -inf · 0 is no number."""
    x, weight, bias = (
        torch.ones(3, 64, dtype=dtype),
        torch.zeros(64, 64, dtype=dtype),
        torch.zeros(64, dtype=dtype),
    )
    bias[:5] = torch.tensor([-torch.inf, torch.nan, torch.inf, -1e38, 0.0])
    for name, run in RACES[operation].candidates.items():
        if usable(operation, name, dtype):
            found = run(x, weight, bias)
            assert found[:, :2].isnan().all(), name
            # PyTorch's own is NaN where it is vectorised.
            assert not found[:, 2].isfinite().any(), name
            assert found[:, 3:].abs().max() < 1e-6, name


@each_dtype
@each_library("aten")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_hidden_layers_in_slices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows of the hidden layer at a time."""
    monkeypatch.setattr(gemm, "_HIDDEN_BYTES", 16 * 40 * torch.finfo(dtype).bits // 8)
    shapes = ((50, 24), (40, 24), (40,), (17, 40), (17,), (50, 17), (17,))
    given = [torch.randn(s).to(dtype) for s in shapes]

    def definition(*given: Any) -> Tensor:
        return reference.linear_residual(reference.linear_gelu(*given[:3]), *given[3:], None)

    assert_as_accurate(gemm.mlp_residual(*given), definition, *given)


def _measured(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, dict[str, float]]) -> None:
    """Races have these results, whatever runs here."""
    for operation, times in seconds.items():
        chosen = min(times, key=times.__getitem__)
        selection = Selection(operation, torch.float32, chosen, times, {})
        monkeypatch.setitem(_selections, (operation, torch.float32), selection)


@pytest.mark.skipif(bool(llvm.why_not()), reason="no compiled kernels here")
@pytest.mark.parametrize(
    ("many", "few", "alone", "both"),
    [
        ((1.0, 1.0, 1.01), (1.0, 1.0, 1.0), "onednn", "panels"),
        ((1.0, 1.0, 0.9), (1.0, 1.0, 1.0), "panels", "panels"),
        # What many rows lose, few gain, or not.
        ((1.0, 1.0, 1.05), (1.0, 1.0, 0.95), "onednn", "panels"),
        ((1.0, 1.0, 1.05), (1.0, 1.0, 1.0), "onednn", "onednn"),
        # Panels also save the calls of a plan.
        ((1.0, 1.0, 1.05), (1e-3, 1e-3, 1e-3), "onednn", "panels"),
        ((1.0, 1.05, 1.4), (1.0, 1.0, 0.5), "plain", "plain"),
        ((1.2, 0.9, 1.25), (1.2, 1.0, 0.5), "onednn", "onednn"),
        ((math.nan,), (math.nan,), "plain", "plain"),
    ],
)
def test_the_layout_of_frozen_weights(
    many: tuple[float, ...],
    few: tuple[float, ...],
    alone: str,
    both: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("aten", "onednn-packed", "llvm-packed")
    races = {"layout": many, "layout for few rows": few}
    _measured(
        monkeypatch,
        {race: dict(zip(names, times, strict=False)) for race, times in races.items()},
    )
    weight = torch.empty(64, 64)
    assert gemm.layout_of(weight) == alone
    assert gemm.layout_of(weight, few_rows=True) == both
    assert gemm.layout_of(torch.empty(63, 64)) != "panels"
    with deterministic_algorithms():
        assert gemm.layout_of(weight, few_rows=True) == "plain"


@pytest.mark.skipif(bool(llvm.why_not()), reason="no compiled kernels here")
def test_wide_layers_have_races_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the base width chooses says nothing of theirs."""
    fast, slow = {"aten": 2.0, "llvm-packed": 1.0}, {"aten": 1.0, "llvm-packed": 2.0}
    few, many = {"aten": 2.0, "llvm": 1.0}, {"aten": 1.0, "llvm": 2.0}
    _measured(
        monkeypatch,
        {
            "layout": fast,
            "layout of 1024 inputs": slow,
            "layout of 2048 inputs": fast,
            "linear": few,
            "linear of 1024 inputs": many,
            "linear of few rows of 1024 inputs": few,
            "linear of 2048 inputs": few,
        },
    )
    weights = [torch.empty(1024, inputs) for inputs in (768, 1024, 1536, 2048, 3072, 4096)]
    layouts = ["panels", "plain", "plain", "panels", "panels", "panels"]
    assert [gemm.layout_of(weight) for weight in weights] == layouts
    chosen = ["llvm", "aten", "aten", "llvm", "llvm", "llvm"]
    assert [gemm._choose("linear", weight, 500) for weight in weights] == chosen
    # A second of the race is a second of a layer of its size.
    weight = torch.empty(768, 1024)
    assert gemm.delay("llvm", "linear", weight, gemm._ROWS) == 1.0


@pytest.mark.skipif(bool(llvm.why_not()), reason="no compiled kernels here")
@pytest.mark.parametrize(("rows", "inputs"), [(63, 1024), (64, 768), (64, 1024), (80, 3072)])
def test_many_rows_that_collide_in_cache_are_copied(
    rows: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xfm_fast.kernels.cpu.llvm import linear

    strides, run = list[int](), linear.linear

    def observed(x: Tensor, *args: Any, **options: Any) -> Tensor:
        strides.append(x.stride(0))
        return run(x, *args, **options)

    monkeypatch.setattr(linear, "linear", observed)
    monkeypatch.setattr(gemm, "_WIDE_VECTORS", True)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(32, inputs), torch.randn(32)
    for each in (weight, gemm.frozen(weight, "panels")):
        found = gemm.compiled(x, each, bias)
        torch.testing.assert_close(
            found, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-3
        )
    copied = rows >= 64 and inputs % 1024 == 0
    assert strides == [inputs + 16 * copied] * 2


@pytest.mark.skipif(bool(llvm.why_not()), reason="no compiled kernels here")
def test_panels_of_another_dtype_or_turned_are_read_as_dense_values() -> None:
    weight, x = torch.randn(64, 32), torch.randn(5, 32)
    panels, bias = gemm.frozen(weight, "panels"), torch.randn(64)
    if llvm.why_not(torch.bfloat16) is None:
        half = x.bfloat16(), bias.bfloat16()
        expected = gemm.compiled(half[0], weight, half[1])
        torch.testing.assert_close(gemm.compiled(half[0], panels, half[1]), expected)
    dout = torch.randn(5, 64)
    torch.testing.assert_close(gemm._compiled_input(dout, panels), dout @ weight)


def test_between_few_rows_and_many_their_times_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    _measured(
        monkeypatch,
        {
            "linear": {"aten": 3.0, "onednn": 2.0, "llvm": 3.0},
            "linear of few rows": {"aten": 1.0, "onednn": 2.0, "llvm": 1.0},
        },
    )
    weight = torch.empty(768, 768)
    assert [gemm._choose("linear", weight, rows) for rows in (1, 15, 16, 100, 140, 224, 1000)] == [
        *["aten"] * 4,
        *["onednn"] * 3,
    ]
    assert gemm.delay("llvm", "linear", weight, 48) == 0.0
    assert gemm.delay("llvm", "linear", weight, 224) == pytest.approx(1.0)
    assert gemm.delay("llvm", "linear", weight, 448) == pytest.approx(2.0)


# Half-precision GEMMs in slices of rows, where a clock finds them faster.


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """The rows of the slices that a GEMM with a residual is computed in, on two threads; slices are faster."""
    monkeypatch.setattr(gemm, "_slices_win", {})
    monkeypatch.setattr(gemm, "_SLICE_ROWS", 32)
    monkeypatch.setattr(gemm, "_best_seconds", lambda candidates, arguments: [1.0, 0.5])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def rows_of(count: int, dtype: torch.dtype = torch.bfloat16) -> list[int]:
        rows: list[int] = []

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
            rows.append(x.shape[0])
            return reference.linear(x, weight, bias) + residual

        given = [torch.randn(shape).to(dtype) for shape in ((count, 24), (8, 24), (8,), (count, 8))]
        found = gemm.multiply(multiply, *given)
        definition: Callable[..., Tensor] = lambda x, w, b, r: reference.linear(x, w, b) + r  # noqa: E731
        assert_as_accurate(found, definition, *given)
        return rows

    yield rows_of
    torch.set_num_threads(threads)


def test_slices_are_even_and_cover_every_row(slices: Callable[..., list[int]]) -> None:
    assert slices(65) == [48, 17]
    assert slices(128) == [64, 64]
    assert slices(1000) == [64] * 15 + [40]


def example(dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.linspace(1, 2, 100_000, dtype=dtype),)


def compare(
    candidates: dict[str, Callable[..., Tensor]], *, alike: bool = True
) -> selection.Selection:
    return selection._compare("test", selection.Race(candidates, example, 1, alike), torch.float32)


def slow(x: Tensor) -> Tensor:
    for _ in range(50):
        x.exp()
    return x * 2


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("not on this processor\nwith a long explanation")


def test_the_fastest_of_those_that_are_right_is_chosen() -> None:
    found = compare(
        {
            "trusted": slow,
            "fast": lambda x: x * 2,
            "wrong": lambda x: x * 2.001,
            "nan": lambda x: x * torch.nan,
            "no": failing,
        }
    )
    assert found.chosen == "fast"
    assert set(found.seconds) == {"trusted", "fast"}
    assert found.rejected["no"] == "not on this processor"
    assert {*found.rejected} == {"wrong", "nan", "no"}
    # Candidates that need not be alike are all trusted, if they run.
    assert compare({"trusted": slow, "half": lambda x: x / 2}, alike=False).chosen == "half"


def test_our_own_kernel_is_taken_unless_another_is_clearly_faster() -> None:
    """Faster by more than the noise, or by as much as a second copy of every weight is worth."""
    for name, other, noise, chosen in (
        ("onednn", 0.93, 0.02, "onednn"),
        ("onednn", 0.99, 0.02, "llvm"),
        ("onednn-packed", 0.95, 0.0, "llvm"),
        ("onednn-packed", 0.85, 0.0, "onednn-packed"),
    ):
        seconds = {"aten": 1.2, name: other, "llvm": 1.0}
        assert selection._fastest(seconds, noise) == chosen
        found = selection.Selection("product", torch.float32, chosen, seconds, {}, noise=noise)
        assert found.reason.startswith(f"{name if chosen == 'llvm' else chosen} measured")


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a file of choices and names it in the environment; no comparison of before is known."""
    candidates: dict[str, Callable[..., Tensor]] = {"trusted": slow, "fast": lambda x: x * 2}
    for operation in ("test", "other"):
        monkeypatch.setitem(RACES, operation, selection.Race(candidates, example, 1))
    monkeypatch.setattr(selection, "_selections", {})
    selection._read.cache_clear()

    def written(**changes: Any) -> Path:
        path = tmp_path / "choices.json"
        path.write_text(json.dumps({**selection.choices(), **changes}))
        monkeypatch.setattr(selection, "_selections", {})
        monkeypatch.setenv(selection.CHOICES, str(path))
        selection._read.cache_clear()
        return path

    yield written
    selection._read.cache_clear()


def test_deterministic_algorithms_are_the_trusted_ones_or_those_of_a_file(
    choices: Callable[..., Path],
) -> None:
    """Whatever the clock said before, and without asking it."""
    assert selection.select("test", torch.float32) == "fast"
    with deterministic_algorithms():
        assert selection.select("test", torch.float32) == "trusted"
        assert selection.select("other", torch.float32) == "trusted"
    (measured,) = selection.selections()
    choices()
    for _ in range(2):
        assert selection.select("test", torch.float32) == "fast"
        with deterministic_algorithms():
            assert selection.select("test", torch.float32) == "fast"
            assert selection.select("other", torch.float32) == "trusted"
    (found,) = selection.selections()
    assert (found.source, found.seconds, found.rejected) == (
        "file",
        measured.seconds,
        measured.rejected,
    )
    # What the file does not know is compared.
    assert selection.select("test", torch.float64) == "fast"


def chosen(**parts: Any) -> dict[str, Any]:
    """A file with this choice."""
    known = {
        "operation": "test",
        "dtype": "float32",
        "chosen": "odd",
        "seconds": {},
        "rejected": {},
    }
    return {"choices": [known | parts]}


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"processor": "another"}, "another"),
        ({"schema": 7}, "schema 7"),
        ({"choices": [{"operation": "test"}]}, ""),
        (chosen(), "odd"),
        (chosen(seconds={"odd": 0}), ""),
    ],
)
def test_a_file_of_choices_that_cannot_be_used(
    choices: Callable[..., Path], changes: dict[str, Any], value: str
) -> None:
    path = choices(**changes)
    with pytest.raises(InputError, match=value) as raised:
        selection.select("test", torch.float32)
    assert str(path) in str(raised.value)
    path.unlink()
    selection._read.cache_clear()
    with pytest.raises(InputError, match=path.name):
        selection.select("test", torch.float32)


SHAPE = (3, 333, 1001)


def _mask(probability: float, seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return Dropout(probability, torch.tensor([seed])).mask(shape, torch.float32).clone()


@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.5])
def test_share(probability: float) -> None:
    mask = _mask(probability, 1)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    spread = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs(float(1 - mask.mean()) - probability) <= 5 * spread + 2**-17
    assert abs(1 - Dropout(probability, torch.tensor([1])).kept - probability) <= 2**-17


def test_masks_do_not_follow_from_each_other() -> None:
    """Neighbours in a row, rows, calls and seeds: what they drop together is what chance drops together."""
    dropout = Dropout(0.5, torch.tensor([3]))
    first, second = (dropout.mask(SHAPE, torch.float32).clone() for _ in range(2))
    pairs = [(first[..., :-k], first[..., k:]) for k in (1, 2, 3, 4, 8)]
    pairs += [(first[:, :-1], first[:, 1:]), (first, second), (first, _mask(0.5, 4))]
    for a, b in pairs:
        assert abs(float(((a - 0.5) * (b - 0.5)).mean()) * 4) <= 5 / a.numel() ** 0.5


def test_tensors_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from each other, whatever their sizes, and writable in any mode."""
    monkeypatch.setattr(workspace, "_CHUNK", 1 << 16)
    memory = workspace.HugePages()
    shapes = [(3, 5), (100, 33), (1 << 18,), (7,), (0, 4)]
    with torch.inference_mode():
        tensors = [memory.empty(shape, torch.int32) for shape in shapes]
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    for number, tensor in enumerate(tensors[:-1]):
        assert not tensor.is_inference()
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
        tensor.fill_(number)
    del memory
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
