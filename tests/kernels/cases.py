"""Every public operation with small arguments: what the contract of the operations is asked of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws, widened
from xfm_fast.kernels import ops

Arguments = dict[str, Any]
ATTENTION = ("aten", "tiled", "exp2", "llvm")
LINEAR = ("aten", "onednn", "onednn-packed", "transposed", "llvm")
LOSS = ("aten", "onednn", "eager")


class Case(NamedTuple):
    """An operation and its arguments for n images, texts or rows; a shape stands for random numbers."""

    operation: Callable[..., Any]
    shapes: Callable[[int], Mapping[str, Any]]
    libraries: tuple[str, ...] = ("aten",)
    autocast: torch.dtype | None = torch.bfloat16
    """The dtype of the result under autocast in bf16; None where the operation keeps its own."""
    without_gradient: tuple[str, ...] = ("row_scale",)
    forms: frozenset[str] = frozenset({"exported", "triton"})
    """`exported`: in a graph without operators of its own; `triton`: there is a kernel for these arguments."""

    def arguments(
        self, dtype: torch.dtype = torch.float32, *, grad: bool = False, n: int = 3
    ) -> Arguments:
        """Arguments by name. Numbers are the same in every dtype; fp64 holds what half precision rounded."""
        draw = torch.Generator().manual_seed(9)
        made: Arguments = {}
        for name, value in self.shapes(n).items():
            if isinstance(value, tuple):
                value = torch.randn(value, generator=draw).to(dtype)
                value.requires_grad_(grad and name not in self.without_gradient)
            made[name] = value
        return made


def leaves(arguments: Arguments) -> list[Tensor]:
    """The tensors that require a gradient."""
    return [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]


def converted(arguments: Arguments, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    """The same numbers in another dtype and place, as leaves of their own."""
    made = {
        name: t.detach().to(device) if isinstance(t, Tensor) else t for name, t in arguments.items()
    }
    return made | {
        name: made[name].to(dtype).requires_grad_(t.requires_grad)
        for name, t in arguments.items()
        if _floating(t)
    }


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def results(found: Any) -> tuple[Tensor, ...]:
    """One or several results as a tuple; a logsumexp of -inf is held at a number."""
    return tuple(t.clamp_min(-99) for t in (found if isinstance(found, tuple) else (found,)))


def run(
    case: Case, arguments: Arguments, backend: ops.Backend | None = None, **options: Any
) -> list[Tensor]:
    """Results of an operation and the gradients of its leaves, for upstream gradients that are always the same."""
    found = results(case.operation(**arguments, backend=backend, **options))
    wanted = leaves(arguments)
    if not wanted:
        return [t.detach() for t in found]
    draw = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(t.shape, generator=draw, dtype=torch.float64).bfloat16().to(t.dtype)
        for t in found
    ]
    return [
        *(t.detach() for t in found),
        *torch.autograd.grad(found, wanted, upstream, materialize_grads=True),
    ]


def offsets(*lengths: int) -> Tensor:
    """`[S + 1]` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _packed(
    queries: Callable[[int], tuple[int, ...]], keys: Callable[[int], tuple[int, ...]], **more: Any
) -> Any:
    def shapes(n: int) -> Arguments:
        q, k = queries(n), keys(n)
        made: Arguments = {"q": (sum(q), 2, 32), "k": (sum(k), 2, 32), "v": (sum(k), 2, 32)}
        made |= {
            "cu_seqlens_q": offsets(*q),
            "cu_seqlens_k": offsets(*k),
            "max_q": max(q, default=0),
        }
        return (
            made
            | {"max_k": max(k, default=0)}
            | {name: make(sum(k)) for name, make in more.items()}
        )

    return shapes


def _alternating(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % 3 != 1


def _some_keys(entries: int, keys: int) -> Tensor:
    """One entry sees nothing."""
    mask = _alternating(entries, keys)
    mask[min(1, max(entries - 1, 0)) :][:1] = False
    return mask


def _window(n: int) -> Arguments:
    return dict.fromkeys("qkv", (n, 16, 2, 32)) | {"table": (48, 2)}


def _biased(n: int, entries: int) -> Arguments:
    return {"q": (n, 5, 2, 32), "k": (n, 9, 2, 32), "v": (n, 9, 2, 32), "bias": (entries, 2, 5, 9)}


def _ids(n: int, rows: int) -> Tensor:
    return torch.arange(3 * n).view(n, 3) % rows


def _linear(n: int, **more: Any) -> Arguments:
    return {"x": (n, 5, 32), "weight": (64, 32), "bias": (64,), **more}


def _norm(n: int) -> Arguments:
    return {"x": (n, 5, 32), "weight": (32,), "bias": (32,)}


def _layers(n: int) -> Arguments:
    layers = {"weight_in": (64, 32), "bias_in": (64,), "weight_out": (32, 64), "bias_out": (32,)}
    return {"x": (n, 5, 32), **layers}


def _factors(n: int) -> Tensor:
    """Stochastic depth: some branches are dropped."""
    return torch.tensor([0.0, 1.25, 2.0]).repeat(n)[:n]


def _vocabulary(n: int) -> Arguments:
    target = torch.arange(3 * n) * 7 % 50
    target[2::4] = -100
    return {"h": (3 * n, 32), "w": (50, 32), "b": (50,), "target": target}


def _joined(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor, other: Tensor, **options: Any
) -> Tensor:
    return ops.joined_linear(x, [first, second], [bias, other], **options)


def _scaled(operation: Callable[..., Any]) -> Callable[..., Any]:
    """`row_scale` in the dtype of x."""

    def call(x: Tensor, row_scale: Tensor, **rest: Any) -> Any:
        return operation(x=x, row_scale=row_scale.to(x.dtype), **rest)

    return call


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention `[B, N, H, D]` in plain PyTorch, with a bias `[G, H or 1, Nq or 1, Nk]`, G a divisor of B."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * scale) @ k.transpose(-1, -2)
    scores = scores if bias is None else scores + bias.repeat(len(q) // len(bias), 1, 1, 1)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _attention_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, ...]:
    given = [t.detach().clone().requires_grad_() for t in (q, k, v, bias) if t is not None]
    with torch.enable_grad():
        out = plain_attention(
            given[0], given[1], given[2], scale, None if bias is None else given[3]
        )
    return torch.autograd.grad(out, given, dout)


def assert_attention_gradients(found: Sequence[Tensor | None], *arguments: Any) -> None:
    """Those of q, k, v and the bias, as accurate as plain PyTorch's; that of a bias is summed and returned in fp32."""
    plain, truth = (
        draws(lambda: _attention_gradients(*arguments)),
        _attention_gradients(*widened(arguments)),
    )
    for i, gradient in enumerate(t for t in found if t is not None):
        assert_accurate(
            gradient.to(plain[0][i].dtype), [each[i] for each in plain], truth[i], "qkvb"[i]
        )


relpos = partial(ops.relpos_attention, window=(3, 5))
_NO_KERNEL = frozenset({"exported"})
_TEXTS = (lambda n: (n + 1, 0, 1, 4 * n), lambda n: (2 * n, n, 0, 11))
CASES: dict[str, Case] = {
    "relpos": Case(relpos, _window, ATTENTION),
    "relpos, masked": Case(
        relpos, lambda n: _window(n) | {"key_mask": _some_keys(n, 16)}, ATTENTION, forms=_NO_KERNEL
    ),
    "bias": Case(ops.bias_attention, lambda n: _biased(n, 1), ATTENTION),
    "bias, by entry": Case(
        ops.bias_attention, lambda n: _biased(n, n) | {"key_mask": _some_keys(n, 9)}, ATTENTION
    ),
    "bias, by window": Case(
        partial(ops.bias_attention, return_lse=True),
        lambda n: _biased(2 * n, n) | {"key_mask": _some_keys(2 * n, 9)},
        ATTENTION,
    ),
    "varlen": Case(ops.varlen_attention, _packed(*_TEXTS), ATTENTION, forms=frozenset({"triton"})),
    "varlen, long": Case(
        ops.varlen_attention,
        _packed(lambda n: (30 * n, 3, 77), lambda n: (70, 10, 23 * n)),
        ATTENTION,
        forms=frozenset({"triton"}),
    ),
    "varlen, masked": Case(
        ops.varlen_attention,
        _packed(*_TEXTS, key_mask=_alternating),
        ATTENTION,
        forms=frozenset({"triton"}),
    ),
    "layer_norm": Case(partial(ops.layer_norm, eps=1e-5), _norm, autocast=None),
    "add_layer_norm": Case(
        partial(ops.add_layer_norm, eps=1e-5),
        lambda n: _norm(n) | {"residual": (n, 5, 32)},
        autocast=None,
    ),
    "add_layer_norm, scaled": Case(
        _scaled(partial(ops.add_layer_norm, eps=1e-5)),
        lambda n: _norm(n) | {"residual": (n, 5, 32), "gamma": (32,), "row_scale": _factors(n)},
        autocast=None,
    ),
    "embed_layer_norm": Case(
        partial(ops.embed_layer_norm, eps=1e-5),
        lambda n: {
            "tokens": _ids(n, 11),
            "positions": _ids(n, 7),
            "word": (11, 32),
            "position": (7, 32),
            "type_row": (32,),
            "weight": (32,),
            "bias": (32,),
        },
        autocast=None,
    ),
    "linear": Case(ops.linear, _linear, LINEAR),
    "linear, no bias": Case(
        partial(ops.linear, bias=None), lambda n: {"x": (n, 32), "weight": (64, 32)}, LINEAR
    ),
    "linear_gelu": Case(ops.linear_gelu, _linear, (*LINEAR, "onednn+gelu")),
    "linear_residual": Case(
        ops.linear_residual, lambda n: _linear(n, residual=(n, 5, 64), gamma=(64,)), LINEAR
    ),
    "linear_residual, scaled": Case(
        _scaled(ops.linear_residual),
        lambda n: _linear(n, residual=(n, 5, 64), gamma=(64,), row_scale=_factors(n)),
        LINEAR,
    ),
    "mlp_residual": Case(ops.mlp_residual, lambda n: _layers(n) | {"residual": (n, 5, 32)}, LINEAR),
    "mlp_residual, scaled": Case(
        _scaled(ops.mlp_residual),
        lambda n: _layers(n) | {"residual": (n, 5, 32), "gamma": (32,), "row_scale": _factors(n)},
        LINEAR,
    ),
    "joined_linear": Case(
        _joined,
        lambda n: {
            "x": (n, 5, 32),
            "first": (64, 32),
            "second": (32, 32),
            "bias": (64,),
            "other": (32,),
        },
        LINEAR,
    ),
    "layer_norm_linear": Case(
        partial(ops.layer_norm_linear, eps=1e-5),
        lambda n: _linear(n, norm_weight=(32,), norm_bias=(32,)),
        LINEAR,
    ),
    "layer_norm_mlp": Case(
        _scaled(partial(ops.layer_norm_mlp, eps=1e-5)),
        lambda n: (
            _layers(n)
            | {"norm_weight": (32,), "norm_bias": (32,), "gamma": (32,), "row_scale": _factors(n)}
        ),
        LINEAR,
    ),
    "linear_add_layer_norm": Case(
        partial(ops.linear_add_layer_norm, eps=1e-5),
        lambda n: _linear(n, residual=(n, 5, 64), norm_weight=(64,), norm_bias=(64,), gamma=(64,)),
        LINEAR,
        autocast=None,
    ),
    "linear_cross_entropy": Case(
        partial(ops.linear_cross_entropy, label_smoothing=0.1),
        _vocabulary,
        LOSS,
        autocast=torch.float32,
    ),
    "token_log_likelihood": Case(
        ops.token_log_likelihood, _vocabulary, LOSS, autocast=torch.float32
    ),
}


# Cases of given sizes: what Triton kernels are compiled and tested for.


def window(height: int, width: int, batch: int, heads: int, head_dim: int) -> Case:
    """Self-attention of a window with a class token."""
    rows = (2 * height - 1) * (2 * width - 1) + 3
    shapes = dict.fromkeys("qkv", (batch, 1 + height * width, heads, head_dim)) | {
        "table": (rows, heads)
    }
    return Case(partial(ops.relpos_attention, window=(height, width)), lambda _: shapes)


def biased(
    batch: int,
    entries: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    *,
    masked: bool = False,
) -> Case:
    """Attention with a bias that `entries` of the batch do not share, and its logsumexp."""
    shapes: Arguments = dict.fromkeys("kv", (batch, keys, heads, head_dim))
    shapes |= {"q": (batch, queries, heads, head_dim), "bias": (entries, heads, queries, keys)}
    if masked:
        shapes["key_mask"] = torch.arange(batch * keys).view(batch, keys) % 5 < 3
    return Case(partial(ops.bias_attention, return_lse=True), lambda _: shapes)


def packed(
    queries: Sequence[int],
    keys: Sequence[int],
    heads: int,
    head_dim: int,
    key_mask: Tensor | None = None,
) -> Case:
    """Attention of sequences of these lengths."""
    shapes: Arguments = dict.fromkeys("kv", (sum(keys), heads, head_dim)) | {
        "q": (sum(queries), heads, head_dim)
    }
    shapes |= {
        "cu_seqlens_q": offsets(*queries),
        "cu_seqlens_k": offsets(*keys),
        "key_mask": key_mask,
    }
    return Case(
        ops.varlen_attention, lambda _: shapes | {"max_q": max(queries), "max_k": max(keys)}
    )


def norm(*shape: int, scaled: bool = False) -> Case:
    """A residual sum with its norm."""
    width = shape[-1]
    shapes: Arguments = {"x": shape, "residual": shape, "weight": (width,), "bias": (width,)}
    if scaled:
        shapes |= {"gamma": (width,), "row_scale": (torch.arange(shape[0]) % 3) / 2}

    def call(row_scale: Tensor | None = None, **given: Any) -> Any:
        scale = None if row_scale is None else row_scale.to(given["x"].dtype)
        return ops.add_layer_norm(**given, eps=1e-5, row_scale=scale)

    return Case(call, lambda _: shapes)


def embedding(count: int, width: int, padding: int | None) -> Case:
    """More tokens than entries, long runs, and entries that no token has."""
    tokens = torch.arange(count) * 7 % 9
    tokens[: count // 2] = 3
    shapes = {
        "tokens": tokens,
        "positions": torch.arange(count) % 5,
        "word": (12, width),
        "position": (6, width),
    }
    return Case(
        partial(ops.embed_layer_norm, eps=1e-5, padding_idx=padding),
        lambda _: shapes | dict.fromkeys(("type_row", "weight", "bias"), (width,)),
    )


def vocabulary(
    operation: Any, rows: int, width: int, size: int, ignored: int = -100, **options: Any
) -> Case:
    """A loss over a vocabulary, some of whose rows do not count."""
    target = torch.arange(rows) * 7 % size
    target[2::5] = ignored
    shapes = {"h": (rows, width), "w": (size, width), "b": (size,), "target": target}
    return Case(partial(operation, ignore_index=ignored, **options), lambda _: shapes)


def activation(rows: int, width: int, *, bias: bool = True) -> Case:
    """A linear layer with its GELU."""
    shapes = {"x": (rows, 24), "weight": (width, 24), "bias": (width,) if bias else None}
    return Case(ops.linear_gelu, lambda _: shapes)


def last_key_masked(*lengths: int) -> Tensor:
    """Of keys every third, and all of the second sequence's."""
    mask = torch.arange(sum(lengths)) % 3 != 1
    mask[lengths[0] : lengths[0] + lengths[1]] = False
    return mask
