"""Graphs of inference: buckets, exactness and refusals on any machine; CUDA's own graphs where there is a GPU.

On the CPU a stand-in records: like a CUDA graph it has fixed memory for inputs and outputs, and a replay overwrites the
outputs of the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast import XFM, XFMConfig, accelerate, graphs
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.graphs import CallGraphs, NoHostReads, Recorder, Recording, Shapes, XFMGraphs, capture

SHAPES = Shapes(
    images=(1, 4), texts=((2, 6, 8), (5, 9, 20)), matches=((1, 3, 9, 12), (3, 5, 9, 20))
)


class StandIn:
    """Records by remembering the work, and replays by doing it again into the memory of the first results."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Any]) -> Recording:
        self.recorded += 1
        outputs = run()

        def replay() -> None:
            self.replayed += 1
            for kept, new in zip(
                pytree.tree_leaves(outputs), pytree.tree_leaves(run()), strict=True
            ):
                kept.copy_(new)

        return Recording(replay, outputs)


def model_on(device: str) -> XFM:
    torch.manual_seed(0)
    config = XFMConfig.preset(
        "tiny", vision_width=64, vision_heads=2, text_width=64, text_heads=2, vocab_size=64
    )
    model = XFM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_(std=0.2)
    return model.to(device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(device: str) -> XFM:
    return model_on(device)


@pytest.fixture
def recorder(device: str) -> Recorder | None:
    return StandIn() if device == "cpu" else None


@pytest.fixture
def captured(model: XFM, recorder: Recorder | None) -> XFMGraphs:
    return capture(model, SHAPES, recorder=recorder)


def texts(count: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids `[count, length]` of texts of different lengths, with their mask."""
    ids = torch.randint(4, 63, (count, length))
    lengths = torch.arange(count) % (length - 1) + 2
    mask = torch.arange(length) < lengths[:, None]
    return ids.masked_fill(~mask, 1).to(device), mask.to(device)


def agree(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_images_of_any_number_up_to_the_captured(
    model: XFM, captured: XFMGraphs, device: str
) -> None:
    """A smaller call after a larger one must not see what the larger one left."""
    side = model.config.image_size
    for count in (1, 4, 3, 2, 0):
        pixels = torch.randn(count, 3, side, side, device=device)
        embeds = captured.encode_image(pixels)
        assert embeds.shape[0] == count
        if count:
            agree(embeds, model.encode_image(pixels))
            for ours, theirs in zip(
                captured.image_memory(embeds).layers, model.image_memory(embeds).layers, strict=True
            ):
                agree(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize(("count", "length"), [(1, 6), (5, 9), (1, 2), (2, 4)])
def test_texts_of_any_lengths(
    model: XFM, captured: XFMGraphs, device: str, count: int, length: int
) -> None:
    captured.encode_text(*texts(5, 7, device))
    ids, mask = texts(count, length, device)
    agree(captured.encode_text(ids, mask), model.encode_text(ids, mask))
    assert not captured.encode_text(ids)[~mask].any()
    # Two texts of four tokens fill their size.
    agree(captured.encode_text(ids[:, :4]), model.encode_text(ids[:, :4]))


@torch.no_grad()
@pytest.mark.parametrize("index", [[1, 0, 0, 1, 1], [1, 1, 1], [0]])
def test_pairs(model: XFM, captured: XFMGraphs, device: str, index: list[int]) -> None:
    side = model.config.image_size
    memory = model.image_memory(
        model.encode_image(torch.randn(max(index) + 1, 3, side, side, device=device))
    )
    ids, mask = texts(len(index), 8, device)
    embeds, of = model.encode_text(ids, mask), torch.tensor(index, device=device)
    found = captured.fuse(embeds, mask, memory, of)
    again = captured.fuse(embeds.flip(0), mask.flip(0), memory, of.flip(0))
    # Results outlive the next replay.
    agree(found, model.fuse(embeds, mask, memory, of, first_token_only=True))
    agree(again, found.flip(0))


@torch.no_grad()
def test_the_smallest_size_runs_and_only_changed_weights_are_recorded_again() -> None:
    """The stand-in computes everything again, so its counts show what a CUDA graph would repeat."""
    stand_in, model = StandIn(), model_on("cpu")
    captured = capture(model, Shapes(images=(8, 1, 2)), recorder=stand_in)
    side, seen, before = model.config.image_size, [], stand_in.recorded
    inner = model.vision_encoder.forward

    def forward(pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        seen.append(pixels.shape[0])
        return inner(pixels, patch_mask)

    model.vision_encoder.forward = forward
    for count in (1, 2, 3, 8):
        captured.encode_image(torch.randn(count, 3, side, side))
    assert seen == [1, 2, 8, 8]
    assert stand_in.replayed == 4
    assert stand_in.recorded == before
    model.get_parameter("vision_encoder.blocks.0.attn.relative_position_bias_table").mul_(2)
    for _ in range(2):
        captured.encode_image(torch.randn(1, 3, side, side))
    assert stand_in.recorded == before + 1


@torch.no_grad()
def test_weights_may_change(model: XFM, captured: XFMGraphs, device: str) -> None:
    """Also those that a bias or a joined projection was made of before recording."""
    side = model.config.image_size
    pixels, (ids, mask) = torch.randn(2, 3, side, side, device=device), texts(2, 4, device)
    before = captured.encode_image(pixels)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    after = captured.encode_image(pixels)
    assert not torch.allclose(before, after)
    agree(after, model.encode_image(pixels))
    agree(captured.encode_text(ids, mask), model.encode_text(ids, mask))


def test_models_that_cannot_be_captured_are_refused() -> None:
    model, shapes = model_on("cpu"), Shapes(images=(1,))
    with pytest.raises(UnavailableError, match="cpu"):
        capture(model, shapes)
    foreign: Any = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval()
    text_only = XFM(model.config, heads=(), encoders=("text",)).eval()
    for refused, named in (
        (model.train(), "training"),
        (foreign, "Sequential"),
        (text_only, "images"),
    ):
        with pytest.raises(InputError, match=named):
            capture(refused, shapes, recorder=StandIn())
    foreign[1].train()
    assert "1 is in training mode" in str(graphs.why_not_captured(foreign))
    with torch.inference_mode():
        loaded = nn.Linear(2, 2).eval()
    assert "inference" in str(graphs.why_not_captured(loaded))
    wrong: list[Any] = [{"texts": ((1, 2),)}, {"texts": ((1, 2, 3),)}, {"matches": ((1, 2, 3, 0),)}]
    for sizes in wrong:
        with pytest.raises(InputError, match=r"texts|matches"):
            Shapes(**sizes)


class Branching(nn.Module):
    """A module whose output size or branch may depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, how: Any = None) -> dict[str, Tensor]:
        out = self.linear(x)
        return {"out": out, "twice": 2 * out, "other": how(x) if how else out}


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda x: x[x[:, 0].nonzero().flatten()], "nonzero"),
        (lambda x: x[x[:, 0] > 0], "index"),
        (lambda x: -x if (x > 0).all() else x, "_local_scalar_dense|is_nonzero"),
    ],
)
def test_sizes_and_branches_that_depend_on_values_are_refused(how: Any, named: str) -> None:
    module = Branching().eval()
    calls = CallGraphs(module, module, StandIn())
    x = torch.randn(3, 4)
    with torch.no_grad():
        agree(calls(x)["out"], module(x)["out"])
        with pytest.raises(InputError, match=named):
            calls(x, how=how)


def test_a_call_on_another_stream_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both use the buffers of one graph: a call waits for the end of the one before, then writes."""
    happened: list[str] = []

    class Stream:
        def record_event(self) -> str:
            happened.append("recorded")
            return "done"

        def wait_event(self, event: str) -> None:
            happened.append(event)

    def record(run: Callable[[], Any]) -> Recording:
        return Recording(lambda: happened.append("replayed"), run())

    monkeypatch.setattr(nn.Parameter, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    build = graphs._module_program

    def build_observed(*args: Any) -> Any:
        program = build(*args)

        def fill(*args: Any) -> None:
            happened.append("filled")
            program.fill(*args)

        return replace(program, fill=fill)

    monkeypatch.setattr(graphs, "_module_program", build_observed)
    module = Branching().eval()
    calls = CallGraphs(module, module, record)
    with torch.no_grad():
        for _ in range(2):
            calls(torch.ones(3, 4))
    assert happened == ["filled", "replayed", "recorded", "done", "filled", "replayed", "recorded"]


def test_any_module_is_captured_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_CALLS", 2)
    module, stand_in = Branching().eval(), StandIn()
    calls = CallGraphs(module, module, stand_in)
    with torch.no_grad():
        for rows in (3, 5, 3, 3, 5):
            x = torch.randn(rows, 4)
            agree(calls(x)["out"], module(x)["out"])
        assert stand_in.recorded == 2
        calls(torch.randn(7, 4))
        calls(torch.randn(3, 4))
        assert stand_in.recorded == 4, "the least recently used graph is dropped"
        with pytest.raises(InputError, match="argument"):
            calls(torch.randn(3, 4), how={1})
    x = torch.randn(3, 4)
    calls(x)["out"].sum().backward()
    assert module.linear.weight.grad is not None, "calls with gradients run the module"
    module.train()
    with torch.no_grad():
        calls(x)
    assert stand_in.recorded == 4


def test_accelerate_takes_graphs_out_again(
    monkeypatch: pytest.MonkeyPatch, device: str, recorder: Recorder
) -> None:
    from xfm_fast.replace import acceleration

    if device == "cpu":
        monkeypatch.setattr(acceleration, "require_gpu", lambda module: None)
        monkeypatch.setattr(
            acceleration, "CallGraphs", lambda run, module: CallGraphs(run, module, recorder)
        )
    layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True).eval().to(device)
    x = torch.randn(2, 5, 64, device=device)
    with pytest.raises(InputError, match="cuda_graphs"):
        accelerate(layer, cuda_graphs=True, unpad=True)
    with torch.no_grad():
        expected = layer(x)
        report = accelerate(layer, cuda_graphs=True, verify=x)
        for _ in range(2):
            agree(layer(x), expected)
        calls = layer.__dict__["forward"]
        assert len(calls._graphs) == 1
        again = accelerate(layer, cuda_graphs=True)
        agree(layer(x), expected)
        with pytest.raises(InputError):
            accelerate(layer, exclude="*")
        agree(layer(x), expected)
        again.revert()
        report.revert()
        assert "forward" not in layer.__dict__
        agree(layer(x), expected)


@torch.no_grad()
def test_encoders_do_not_synchronise_with_the_host() -> None:
    model, pixels = model_on("cpu"), torch.randn(2, 3, 32, 32)
    model.image_memory(model.encode_image(pixels))
    with NoHostReads():
        model.project_image(model.encode_image(pixels))
        model.image_memory(model.encode_image(pixels))
