"""A batch in one chunk per thread: the same results, chunked only where it applies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.models.hidden_states import record_hidden_states
from xfm_fast import XFM, XFMConfig
from xfm_fast.kernels.backend import use_backend
from xfm_fast.kernels.cpu import gemm, int8
from xfm_fast.models import shares, text
from xfm_fast.models.shares import Texts
from xfm_fast.packing import ImageGroups, Sequences


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(shares, "_seconds", {})
    yield
    torch.set_num_threads(before)


class Watched:
    """Doubles a batch, and records the length of its parts and their numbers of threads."""

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
    times = iter(
        [
            t
            for seconds in ((3, 2, 3, 2) if faster == "shared" else (2, 3, 2, 3))
            for t in (0, seconds)
        ]
    )
    monkeypatch.setattr(shares, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    batch = torch.arange(8.0).view(4, 2)
    seen = []
    for _ in range(6):
        run = Watched()
        assert torch.equal(shares.run_chunked(run, batch, "kind"), batch * 2)
        seen.append(run.parts)
        assert torch.get_num_threads() == 2
    assert seen == [WHOLE, SHARED, WHOLE, SHARED, *[SHARED if faster == "shared" else WHOLE] * 2]


def test_texts_are_cut_between_two_texts() -> None:
    lengths = [3, 1, 6, 0, 2, 4]
    texts = Texts(
        torch.arange(16.0)[:, None],
        Sequences.from_lengths(torch.tensor(lengths)),
        ImageGroups(torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)),
    )
    for chunks in (1, 2, 3, 16):
        parts = texts.chunk(chunks)
        assert torch.equal(torch.cat([part.tokens for part in parts]), texts.tokens)
        assert [n for part in parts for n in part.sequences.cu_seqlens.diff().tolist()] == lengths
        images = torch.cat(
            [part.groups.cu_texts.diff()[None] for part in parts if part.groups is not None]
        ).sum(0)
        assert images.tolist() == [2, 0, 3, 1]
        for part in parts:
            assert part.sequences.cu_seqlens[0] == 0
            assert part.sequences.longest >= int(part.sequences.cu_seqlens.diff().max())
    assert [len(part) for part in texts.chunk(2)] == [10, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_in_shares(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, freeze_in: Callable[[gemm.Layout], None]
) -> None:
    freeze_in("onednn")
    monkeypatch.setattr(text, "LEAST_TOKENS", 39 // 2)
    model = XFM(XFMConfig.preset("tiny"), heads=()).eval().to(dtype)
    ids = torch.randint(5, model.config.vocab_size, (6, 8))
    mask = torch.arange(8)[None] < torch.tensor([8, 5, 7, 3, 8, 8])[:, None]
    # Texts in any order; the second of three images has none.
    images, image_of = (
        torch.randn(3, 5, model.config.vision_width, dtype=dtype),
        torch.tensor([2, 0, 2, 2, 0, 0]),
    )

    def run() -> list[Tensor]:
        embeds, memory = model.encode_text(ids, mask), model.image_memory(images)
        fused = (
            model.fuse(embeds, mask, memory, image_of, first_token_only=first)
            for first in (False, True)
        )
        return [embeds, *fused]

    with torch.inference_mode():
        expected = run()
        assert not shares._seconds
        model.freeze()
        found = [run(), run()]
        assert [len(times) for way in shares._seconds.values() for times in way] == [1, 1] * 3
        shares._seconds.clear()
        # Hooked layers are called for all texts at once; small batches and kept padding are not chunked.
        with record_hidden_states(model) as states:
            found.append(run())
        assert [len(state) for state in states.text] == [6] * (1 + model.config.text_layers)
        model.encode_text(ids, mask, keep_padding=True)
        monkeypatch.setattr(text, "LEAST_TOKENS", 20)
        found.append(run())
        assert not shares._seconds
    allowed = 2e-5 if dtype == torch.float32 else 0.1
    for each in found:
        for one, other in zip(each, expected, strict=True):
            assert float((one - other).abs().max()) <= allowed * float(other.abs().max())


@pytest.mark.usefixtures("int8_chosen")
@pytest.mark.parametrize(
    "kind",
    [
        "frozen",
        pytest.param(
            "int8",
            marks=pytest.mark.skipif(int8.why_not() is not None, reason="no int8 GEMMs here"),
        ),
    ],
)
def test_images_in_shares(kind: str, freeze_in: Callable[[gemm.Layout], None]) -> None:
    freeze_in("onednn")
    model = XFM(XFMConfig.preset("tiny"), encoders=("vision",), heads=()).eval()
    if kind == "int8":
        model.quantise()
    pixels = torch.randn(4, 3, model.config.image_size, model.config.image_size)
    with torch.inference_mode():
        torch.set_num_threads(1 if kind == "int8" else 2)
        expected = model.encode_image(pixels)
        assert not shares._seconds
        torch.set_num_threads(2)
        if kind == "frozen":
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
    for each in found:
        assert float((each - expected).abs().max()) <= (0.05 if kind == "int8" else 2e-5) * float(
            expected.abs().max()
        )
