"""The Triton tests exist twice, interpreted and compiled; the way to a GPU and back is proved without one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.triton_testing import INTERPRETED, Carried, compiled_kernels

from tests.kernels.cases import CASES, leaves, results  # isort: skip

CPU = torch.device("cpu")


@pytest.mark.skipif(
    not INTERPRETED, reason="the kernels run on a GPU here, where the tests themselves are carried"
)
class TestCarrying:
    @pytest.mark.parametrize("name", ["varlen"])
    def test_operations_reach_the_launchers(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a GPU: CPU tensors, no interpreter that the backend would know of."""
        arguments = CASES[name].arguments(grad=True)
        expected = CASES[name].operation(**arguments, backend="triton")
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="triton"):
            CASES[name].operation(**arguments, backend="triton")
        with compiled_kernels(CPU):
            found = CASES[name].operation(**arguments, backend="triton")
            torch.autograd.grad(found.sum(), leaves(arguments))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "name",
        [
            "relpos",
            "varlen",
            "add_layer_norm",
            "embed_layer_norm",
            "linear_gelu",
            "linear_cross_entropy",
        ],
    )
    def test_launchers_let_the_host_read_nothing(self, name: str) -> None:
        """Operators are one operation to whoever records a graph of the model: this looks at what is in them."""
        from xfm_fast.graphs import NoHostReads

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                seen.append(function.__name__)
                with NoHostReads():
                    return function(*args, **kwargs)

            return call

        arguments, seen = CASES[name].arguments(grad=True), list[str]()
        with compiled_kernels(CPU):
            modules = [
                m for n, m in sys.modules.items() if n.startswith("xfm_fast.kernels.triton.")
            ]
            launchers = {
                id(v): v for m in modules for v in vars(m).values() if isinstance(v, Carried)
            }
            for launcher in launchers.values():
                launcher.function = watched(launcher.function)
            found = results(CASES[name].operation(**arguments, backend="triton"))
            torch.autograd.grad(found, leaves(arguments), [torch.ones_like(t) for t in found])
        assert any("backward" in name for name in seen), seen
