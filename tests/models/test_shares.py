"""A batch in shares: the same result, whichever way is chosen, and nothing of it where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.agreement import deterministic_algorithms
from xfm_fast import XFM, XFMConfig
from xfm_fast.kernels.backend import use_backend
from xfm_fast.kernels.cpu import products
from xfm_fast.models import shares
from xfm_fast.models.xfm import record_hidden_states


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(shares, "_seconds", {})
    yield
    torch.set_num_threads(before)


class Watched:
    """Doubles a batch, and remembers how long its parts were and on how many threads each was computed."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int]] = []

    def __call__(self, batch: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.parts.append((len(batch), torch.get_num_threads()))
        return batch * 2


WHOLE, SHARED = [(4, 2)], [(2, 1), (2, 1)]


@pytest.mark.parametrize("faster", ["whole", "shared"])
@torch.inference_mode()
def test_the_faster_way_stays(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([t for seconds in ((3, 2, 3, 2) if faster == "shared" else (2, 3, 2, 3)) for t in (0, seconds)])
    monkeypatch.setattr(shares, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    batch = torch.arange(8.0).view(4, 2)
    seen = []
    for _ in range(6):
        run = Watched()
        assert torch.equal(shares.in_shares(run, batch, "kind"), batch * 2)
        seen.append(run.parts)
        assert torch.get_num_threads() == 2
    assert seen == [WHOLE, SHARED, WHOLE, SHARED, *[SHARED if faster == "shared" else WHOLE] * 2]


@torch.inference_mode()
def test_what_is_not_shared() -> None:
    for size, threads in ((3, 2), (1, 2), (4, 1)):
        torch.set_num_threads(threads)
        for _ in range(5):
            run = Watched()
            shares.in_shares(run, torch.ones(size, 1), "kind")
            assert run.parts == [(size, threads)]
    torch.set_num_threads(2)
    with deterministic_algorithms():
        for _ in range(3):
            run = Watched()
            shares.in_shares(run, torch.ones(4, 1), "kind")
            assert run.parts == WHOLE


@torch.inference_mode()
def test_an_error_in_a_share_comes_through() -> None:
    def fail(batch: Tensor) -> Tensor:
        if len(batch) < 4:
            raise ValueError("in a share")
        return batch

    shares.in_shares(fail, torch.ones(4, 1), "kind")
    with pytest.raises(ValueError, match="in a share"):
        shares.in_shares(fail, torch.ones(4, 1), "kind")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_in_shares(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda dtype: True)
    model = XFM(XFMConfig.preset("tiny"), encoders=("vision",), heads=()).eval().to(dtype)
    size = model.config.image_size
    pixels = torch.randn(4, 3, size, size)
    with torch.inference_mode():
        expected = model.encode_image(pixels)
        assert not shares._seconds
        model.freeze()
        found = [model.encode_image(pixels) for _ in range(2)]
        assert [len(times) for way in shares._seconds.values() for times in way] == [1, 1]
        shares._seconds.clear()
        with record_hidden_states(model) as states:
            found.append(model.encode_image(pixels))
        assert [len(state) for state in states.vision] == [4] * (1 + model.config.vision_depth)
        with use_backend("cpu"):
            found.append(model.encode_image(pixels))
    with torch.no_grad():
        found.append(model.encode_image(pixels))
    assert not shares._seconds
    allowed = 2e-5 if dtype == torch.float32 else 0.1
    for each in found:
        assert float((each - expected).abs().max()) <= allowed * float(expected.abs().max())
