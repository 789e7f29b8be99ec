"""Inference with CUDA graphs: each size is captured once, then replayed without launch overhead.

At batch 1 a GPU computes X-FM faster than Python launches it. `capture` records the model at a few sizes, and a call
uses the smallest that it fits. The rest is filled with padding images, texts and tokens, which real tokens do not
attend to and whose results are cut off, so results equal the model's. `CallGraphs` captures any module, by shape.

    >>> graphs = capture(model, Shapes(images=(1, 8), texts=((1, 40, 40), (32, 40, 512))))
    >>> embeds = graphs.encode_image(pixels)  # 5 images: those of 8, cut to 5

Offsets and positions of packed texts are values and may change between replays; the numbers of texts and tokens are
sizes and may not.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.caching import cached_tensors, graphs_read_cache
from xfm_fast.models import inputs
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Packing, Sequences

Size = tuple[int, ...]
Call = TypeVar("Call")
_WARM_UPS = 3
MOST_CALLS = 16
"""Cached graphs per module of `CallGraphs`; the least recently used is dropped."""


class Recording(NamedTuple):
    """Recorded work, and the memory that each replay writes its results to."""

    replay: Callable[[], None]
    outputs: Any


Recorder = Callable[[Callable[[], Any]], Recording]
"""Runs and records the work."""


def record(run: Callable[[], Any], pool: Any = None) -> Recording:
    """Record work as a CUDA graph after warm-up runs; graphs of one `pool` share their temporary memory.

    Raises `InputError` with the reason if CUDA cannot record the work.
    """
    # Work on the default stream cannot be recorded, and the warm-up has to be over before recording begins.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side):
            outputs = run()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"CUDA cannot record this work ({reason}); run the model without graphs"
        ) from error
    return Recording(graph.replay, outputs)


class NoHostReads(TorchDispatchMode):
    """Context in which operations that a graph cannot contain raise an error with their name.

    These are operations whose result the host reads (`item`, `equal`, a truth value) or whose size depends on values
    (`nonzero`, indexing by a mask), and copies between devices. Our own operators count as one operation each.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, aten, why = kwargs or {}, torch.ops.aten, None
        # Cached weights are compared with their source on a CPU only, without a synchronisation.
        on_host = func is aten.equal.default and args[0].device.type == "cpu"
        # Indexing has the size of its indices, unless they are masks.
        sized = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
        if func is aten.index.Tensor:
            sized = all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])
        if torch.Tag.data_dependent_output in func.tags and not on_host:
            why = "lets the host read a tensor"
        elif torch.Tag.dynamic_output_shape in func.tags and not sized:
            why = "has a size that depends on values"
        elif func in (aten._to_copy.default, aten.copy_.default):
            other = (
                args[1].device
                if func is aten.copy_.default
                else kwargs.get("device") or args[0].device
            )
            why = None if other == args[0].device else "copies to another device"
        if why is not None:
            raise InputError(
                f"{func.__name__.partition('.')[0]} {why}, which a graph cannot contain; run the model without graphs"
            )
        return func(*args, **kwargs)


def why_not_captured(module: nn.Module) -> str | None:
    """Why a module cannot be captured on any device, with the remedy; None if it can."""
    for path, part in module.named_modules():
        if part.training:
            return f"{path or 'the model'} is in training mode, which a graph cannot draw for; call model.eval() first"
    for name, parameter in module.named_parameters():
        if parameter.is_inference():
            return f"{name} is an inference tensor, whose changes are not tracked; load it outside inference mode"
    return None


def require_gpu(module: nn.Module) -> None:
    """Raise `UnavailableError` unless the module is on a GPU."""
    devices = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}
    if devices != {"cuda"}:
        where = ", ".join(sorted(devices)) or "no device"
        raise UnavailableError(
            f"CUDA graphs need a model on a GPU, not on {where}; call model.cuda() first"
        )


class Program(ABC, Generic[Call]):
    """Work of one kind, at several sizes; a call is the caller's input after validation."""

    name: str

    @abstractmethod
    def needs(self, call: Call) -> Size:
        """The size of a call."""

    @abstractmethod
    def buffers(self, size: Size) -> dict[str, Tensor]:
        """The memory that the graph of a size reads, initialised with valid values."""

    @abstractmethod
    def run(self, size: Size, buffers: dict[str, Tensor]) -> Any:
        """Compute on the content of the buffers."""

    @abstractmethod
    def fill(self, call: Call, size: Size, buffers: dict[str, Tensor]) -> None:
        """Copy a call into the buffers, and padding into the rest."""

    @abstractmethod
    def result(self, call: Call, outputs: Any) -> Any:
        """Copy the call's part of the outputs."""


class _Graph(NamedTuple):
    buffers: dict[str, Tensor]
    recording: Recording
    stamp: tuple[int, int]
    graphs_read_cache: list[Any]


class Sizes(Generic[Call]):
    """The graphs of one program, by size."""

    def __init__(
        self, program: Program[Call], model: nn.Module, sizes: Iterable[Size], recorder: Recorder
    ) -> None:
        self.program, self.model, self.recorder = program, model, recorder
        # Sorted so that the first size that fits is the smallest.
        self.sizes = sorted(set(sizes), key=lambda size: (size[-1:], size))
        self._parameters = tuple(model.parameters())
        self._lock = threading.Lock()
        self._device = next((p.device for p in self._parameters if p.is_cuda), None)
        self._done: Any = None
        self._graphs = {size: self._record(size) for size in self.sizes}

    def _stamp(self) -> tuple[int, int]:
        # Graphs read weights in place, but not tensors cached from weights before recording.
        parameters = self._parameters
        return sum(p._version for p in parameters), sum(p.data_ptr() for p in parameters)

    @torch.no_grad()
    def _record(self, size: Size) -> _Graph:
        buffers = self.program.buffers(size)
        # The first run caches tensors computed from weights, with copies from the host.
        self.program.run(size, buffers)
        with NoHostReads():
            self.program.run(size, buffers)
        with graphs_read_cache():
            recording = self.recorder(lambda: self.program.run(size, buffers))
        return _Graph(buffers, recording, self._stamp(), cached_tensors(self._parameters))

    @torch.no_grad()
    def __call__(self, call: Call) -> Any:
        needed = self.program.needs(call)
        size = next(
            (s for s in self.sizes if all(n <= most for n, most in zip(needed, s, strict=True))),
            None,
        )
        if size is None:
            raise InputError(
                f"{self.program.name} needs size {needed}, captured are "
                f"{', '.join(map(str, self.sizes)) or 'no sizes'}; capture it too"
            )
        with self._lock:
            # The lock orders hosts. On another stream, the last call may still read the buffers.
            if self._done is not None:
                torch.cuda.current_stream(self._device).wait_event(self._done)
            graph = self._graphs[size]
            if graph.stamp != self._stamp():
                graph = self._graphs[size] = self._record(size)
            self.program.fill(call, size, graph.buffers)
            graph.recording.replay()
            result = self.program.result(call, graph.recording.outputs)
            if self._device is not None:
                self._done = torch.cuda.current_stream(self._device).record_event()
            return result


class CallGraphs:
    """Any module, captured at its first call for each input shape; arguments other than tensors are constants.

    Calls with gradients or in training mode run the module itself.
    """

    def __init__(
        self, run: Callable[..., Any], module: nn.Module, recorder: Recorder | None = None
    ) -> None:
        self.run, self.module = run, module
        self._recorder, self._lock = recorder or record, threading.Lock()
        self._graphs: OrderedDict[Any, Sizes[list[Any]]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            return self.run(*args, **kwargs)
        if why_not_captured(self.module) is not None:
            return self.run(*args, **kwargs)
        leaves, form = pytree.tree_flatten((args, kwargs))
        key = (
            str(form),
            tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves),
        )
        try:
            hash(key)
        except TypeError:
            raise InputError(
                "an argument is neither a tensor nor hashable; call accelerate with cuda_graphs=False"
            ) from None
        with self._lock:
            if key not in self._graphs:
                program = _Calls(self.run, leaves, form)
                self._graphs[key] = Sizes(program, self.module, [()], self._recorder)
                if len(self._graphs) > MOST_CALLS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return self._graphs[key](leaves)


class _Calls(Program[list[Any]]):
    name = "the module"

    def __init__(
        self, run: Callable[..., Any], leaves: Sequence[Any], form: pytree.TreeSpec
    ) -> None:
        self.call, self.leaves, self.form = run, list(leaves), form

    def needs(self, call: list[Any]) -> Size:
        return ()

    def buffers(self, size: Size) -> dict[str, Tensor]:
        return {
            str(i): leaf.clone() for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)
        }

    def run(self, size: Size, buffers: dict[str, Tensor]) -> Any:
        leaves = [buffers.get(str(i), leaf) for i, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return self.call(*args, **kwargs)

    def fill(self, call: list[Any], size: Size, buffers: dict[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            buffer.copy_(call[int(name)], non_blocking=True)

    def result(self, call: list[Any], outputs: Any) -> Any:
        return pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs
        )


@dataclass(frozen=True)
class Shapes:
    """The sizes to capture an X-FM at: up to `texts` texts of up to `length` tokens, and `tokens` without padding.

    32 captions padded to 40 have about 512 tokens.
    """

    images: tuple[int, ...] = ()  # batch sizes of `encode_image` and `image_memory`
    texts: tuple[tuple[int, int, int], ...] = ()  # (texts, length, tokens) of `encode_text`
    matches: tuple[tuple[int, int, int, int], ...] = ()  # (images, texts, length, tokens) of `fuse`

    def __post_init__(self) -> None:
        for name, count in (("images", 1), ("texts", 3), ("matches", 4)):
            for given in getattr(self, name):
                size = given if isinstance(given, tuple) else (given,)
                if len(size) != count or not all(isinstance(n, int) and n > 0 for n in size):
                    raise InputError(
                        f"{name} contains {given!r}; a size is {count} positive integers"
                    )
        for *_, texts, length, tokens in (*self.texts, *self.matches):
            if tokens > texts * length:
                raise InputError(
                    f"{tokens} tokens exceed {texts} texts of {length}; give at most {texts * length}"
                )


class _Images(Program[Tensor]):
    """A call with one row per image, `[B, *shape]`; `encode` returns a tensor or a tuple of them."""

    def __init__(
        self, name: str, model: XFM, shape: tuple[int, ...], encode: Callable[[Tensor], Any]
    ) -> None:
        self.name, self.model, self.shape, self.encode = name, model, shape, encode

    def needs(self, call: Tensor) -> Size:
        return (call.shape[0],)

    def buffers(self, size: Size) -> dict[str, Tensor]:
        return {
            "x": torch.zeros(*size, *self.shape, dtype=self.model.dtype, device=self.model.device)
        }

    def run(self, size: Size, buffers: dict[str, Tensor]) -> Any:
        return self.encode(buffers["x"])

    def fill(self, call: Tensor, size: Size, buffers: dict[str, Tensor]) -> None:
        buffers["x"][: call.shape[0]].copy_(call, non_blocking=True)

    def result(self, call: Tensor, outputs: Any) -> Any:
        return pytree.tree_map(lambda rows: rows[: call.shape[0]].clone(), outputs)


@dataclass(frozen=True)
class _PackedRows:
    """Layout of packed texts in buffers for `texts` texts of at most `length`, and at most `tokens` in total.

    Real tokens are followed by at least one padding token, in texts of at most `length`. Empty padding texts come
    first: a read of token 0 of any text must find a token.
    """

    texts: int
    length: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.tokens + 1

    @property
    def spare(self) -> int:
        """Number of padding texts."""
        return -(-self.rows // self.length)

    @property
    def sequences(self) -> int:
        return self.texts + self.spare

    def offsets(self, cu_seqlens: Tensor, used: int) -> Tensor:
        """`[sequences + 1]` int32, from the offsets of the real texts, which have `used` tokens."""
        device = cu_seqlens.device
        unused = torch.full(
            (self.texts + 1 - cu_seqlens.shape[0],), used, dtype=torch.int32, device=device
        )
        left = self.length * torch.arange(self.spare - 1, -1, -1, dtype=torch.int32, device=device)
        return torch.cat([cu_seqlens.int(), unused, (self.rows - left).clamp(min=used)])


class _TextCall(NamedTuple):
    ids: Tensor
    packing: Packing


class _Texts(Program[_TextCall]):
    name = "encode_text"

    def __init__(self, model: XFM) -> None:
        self.model = model

    def needs(self, call: _TextCall) -> Size:
        return (*call.ids.shape, call.packing.positions.shape[0])

    def buffers(self, size: Size) -> dict[str, Tensor]:
        layout, device = _PackedRows(*size), self.model.device
        positions = torch.arange(layout.rows, device=device)
        first = torch.zeros(1, dtype=torch.int32, device=device)
        return {
            # Token 0 (<s>) is a real token, so padding texts have positions.
            "ids": torch.zeros(layout.sequences, layout.length, dtype=torch.int64, device=device),
            "positions": layout.texts * layout.length + positions,
            "cu_seqlens": layout.offsets(first, 0),
        }

    def run(self, size: Size, buffers: dict[str, Tensor]) -> Tensor:
        layout = _PackedRows(*size)
        packing = Packing(
            cu_seqlens=buffers["cu_seqlens"], max_seqlen=layout.length, positions=buffers["positions"],
            shape=(layout.sequences, layout.length),
        )  # fmt: skip
        return packing.unpad(self.model.text_encoder(buffers["ids"], packing))

    def fill(self, call: _TextCall, size: Size, buffers: dict[str, Tensor]) -> None:
        layout, packing = _PackedRows(*size), call.packing
        texts, length = call.ids.shape
        used = packing.positions.shape[0]
        buffers["ids"][:texts, :length].copy_(call.ids, non_blocking=True)
        places = packing.positions
        buffers["positions"][:used].copy_(
            places // length * layout.length + places % length, non_blocking=True
        )
        nothing = torch.arange(layout.rows - used, device=self.model.device)
        buffers["positions"][used:].copy_(layout.texts * layout.length + nothing)
        buffers["cu_seqlens"].copy_(layout.offsets(packing.cu_seqlens, used), non_blocking=True)

    def result(self, call: _TextCall, outputs: Tensor) -> Tensor:
        texts, length = call.ids.shape
        return outputs[:texts, :length].clone()


class _PairCall(NamedTuple):
    tokens: Tensor
    packing: Packing
    groups: ImageGroups
    memory: ImageMemory


class _Pairs(Program[_PairCall]):
    name = "fuse"

    def __init__(self, model: XFM) -> None:
        self.model = model

    def needs(self, call: _PairCall) -> Size:
        return (call.memory.images, *call.packing.shape, call.tokens.shape[0])

    def buffers(self, size: Size) -> dict[str, Tensor]:
        images, layout, config = size[0], _PackedRows(*size[1:]), self.model.config
        like = {"dtype": self.model.dtype, "device": self.model.device}
        heads = (config.text_heads, config.text_width // config.text_heads)
        layers = {
            f"memory {number}": torch.zeros(images, config.num_image_tokens, 2, *heads, **like)
            for number in range(config.fusion_layers)
        }
        nothing = torch.zeros(images, dtype=torch.int32, device=self.model.device)
        return {
            "tokens": torch.zeros(layout.rows, config.text_width, **like),
            "cu_seqlens": layout.offsets(nothing[:1], 0),
            # Padding texts attend to the last image.
            "cu_texts": torch.cat([nothing, nothing.new_full((1,), layout.sequences)]),
            **layers,
        }

    def run(self, size: Size, buffers: dict[str, Tensor]) -> Tensor:
        layers = tuple(
            buffers[f"memory {number}"] for number in range(self.model.config.fusion_layers)
        )
        return self.model.fusion_encoder(
            buffers["tokens"], Sequences(cu_seqlens=buffers["cu_seqlens"], max_seqlen=size[2]), ImageMemory(layers),
            ImageGroups(buffers["cu_texts"]), first_token_only=True,
        )  # fmt: skip

    def fill(self, call: _PairCall, size: Size, buffers: dict[str, Tensor]) -> None:
        layout, used, images = _PackedRows(*size[1:]), call.tokens.shape[0], call.memory.images
        buffers["tokens"][:used].copy_(call.tokens)
        buffers["cu_seqlens"].copy_(layout.offsets(call.packing.cu_seqlens, used))
        cu_texts = buffers["cu_texts"]
        # The order of the texts determines their image; empty slots come before the padding texts.
        cu_texts[:images].copy_(call.groups.cu_texts[:-1])
        cu_texts[images:-1].fill_(call.packing.shape[0])
        for number, layer in enumerate(call.memory.layers):
            buffers[f"memory {number}"][:images].copy_(layer)

    def result(self, call: _PairCall, outputs: Tensor) -> Tensor:
        return call.packing.restore(outputs[: call.packing.shape[0]])[:, None].clone()


@dataclass
class XFMGraphs:
    """The captured encoders of an X-FM, with the methods and arguments of the model.

    Thread-safe: results are copied out before the next replay.
    """

    model: XFM
    _images: Sizes[Tensor]
    _memories: Sizes[Tensor]
    _texts: Sizes[_TextCall]
    _pairs: Sizes[_PairCall]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """`[B, 3, R, R]` → `[B, 1 + N, vision_width]`; raises `InputError` for more images than captured."""
        inputs.check_pixels(pixels, self.model.config)
        return self._images(pixels)

    def image_memory(self, image_embeds: Tensor) -> ImageMemory:
        """Keys and values of every fusion layer, of `[B, 1 + N, vision_width]`."""
        config = self.model.config
        if image_embeds.shape[1:] != (config.num_image_tokens, config.vision_width):
            raise InputError(
                f"image embeddings are {[*image_embeds.shape]}, captured are "
                f"[B, {config.num_image_tokens}, {config.vision_width}]; call the model"
            )
        return ImageMemory(self._memories(image_embeds))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[P, L]` → `[P, L, text_width]`, zeros at padded positions. A mask on the CPU avoids a synchronisation."""
        mask = inputs.check_tokens(input_ids, attention_mask, self.model.config)
        return self._texts(_TextCall(input_ids, Packing.from_mask(mask).to(self.model.device)))

    def fuse(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        memory: ImageMemory,
        image_index: Tensor | None = None,
        *,
        first_token_only: bool = True,
    ) -> Tensor:
        """Token 0 of the fused texts `[P, L, text_width]`: `[P, 1, text_width]`, as `XFM.fuse(first_token_only=True)`.

        Raises `InputError` for more pairs than captured, masked image tokens, texts that do not match the images, and
        `first_token_only=False`, which `XFM.fuse` takes.
        """
        if not first_token_only:
            raise InputError(
                "graphs return token 0; call XFM.fuse with first_token_only=False for all tokens"
            )
        mask, groups = self.model.check_pairs(text_embeds, attention_mask, memory, image_index)
        if memory.token_mask is not None:
            raise InputError(
                "the memory has masked image tokens, which were not captured; call model.fuse"
            )
        packing = Packing.from_mask(mask.to(text_embeds.device), order=groups.order)
        return self._pairs(_PairCall(packing.pack(text_embeds), packing, groups, memory))


def capture(model: XFM, shapes: Shapes, *, recorder: Recorder | None = None) -> XFMGraphs:
    """Capture the encoders of an X-FM on a GPU at some sizes, for inference; each takes memory for its buffers.

    Weights may be changed in place later: the next call captures again. Raises `InputError` if the model cannot be
    captured, with the reason, and `UnavailableError` if it is not on a GPU (unless a `recorder` records the work).
    """
    if not isinstance(model, XFM):
        raise InputError(
            f"capture() takes an XFM, not {type(model).__name__}; use accelerate(model, cuda_graphs=True)"
        )
    why_not = why_not_captured(model)
    if why_not is not None:
        raise InputError(why_not)
    if recorder is None:
        require_gpu(model)
        recorder = partial(record, pool=torch.cuda.graph_pool_handle())
    fused = model.config.fusion_layers > 0 and "fusion" in model.encoders
    present = {
        "images": "vision" in model.encoders,
        "texts": "text" in model.encoders,
        "matches": fused,
    }
    for name, there in present.items():
        if getattr(shapes, name) and not there:
            raise InputError(f"the model has no encoder for {name}; leave {name} out")
    images, config = [(size,) for size in shapes.images], model.config
    pixels, tokens = (
        (3, config.image_size, config.image_size),
        (config.num_image_tokens, config.vision_width),
    )
    encode = _Images("encode_image", model, pixels, model.encode_image)
    project = _Images(
        "image_memory", model, tokens, lambda embeds: model.image_memory(embeds).layers
    )
    return XFMGraphs(
        model,
        Sizes(encode, model, images, recorder),
        Sizes(project, model, images if fused else [], recorder),
        Sizes(_Texts(model), model, shapes.texts, recorder),
        Sizes(_Pairs(model), model, shapes.matches, recorder),
    )
