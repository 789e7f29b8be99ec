"""Inference with CUDA graphs: each size is captured once, then replayed without launch overhead.

At batch 1 a GPU computes X-FM faster than Python launches it. `capture` records the model at a few
sizes, and a call replays the smallest that it fits, filled up with padding images, texts and
tokens. Real tokens do not attend to padding and its results are cut off, so results equal the
model's. `CallGraphs` captures any module, by input shape.

    >>> graphs = capture(model, Shapes(images=(1, 8), texts=((1, 40, 40), (32, 40, 512))))
    >>> embeds = graphs.encode_image(pixels)  # 5 images: those of 8, cut to 5

Offsets and positions of packed texts are values and may change between replays; the numbers of
texts and tokens are sizes and may not.
"""

from __future__ import annotations

import threading
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
Buffers = dict[str, Tensor]
Call = TypeVar("Call")
_WARM_UPS = 3
MOST_CALLS = 16
"""Cached graphs per module of `CallGraphs`; the least recently used is dropped."""


class Recording(NamedTuple):
    """Recorded work, and the memory that a replay writes its results to."""

    replay: Callable[[], None]
    outputs: Any


Recorder = Callable[[Callable[[], Any]], Recording]
"""Runs and records the work."""


def record(run: Callable[[], Any], pool: Any = None) -> Recording:
    """Record work as a CUDA graph, after warm-up runs.

    Args:
        run: The work; reads and writes fixed memory.
        pool: Memory pool; graphs of one pool share their temporary memory.

    Raises:
        InputError: CUDA cannot record the work.
    """
    # Work on the default stream cannot be recorded, and the warm-up must end before recording
    # begins.
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
    """Context that refuses operations which a graph cannot contain, by name.

    These are operations whose result the host reads (`item`, `equal`, a truth value) or whose size
    depends on values (`nonzero`, indexing by a mask), and copies between devices. Our operators
    count as one operation each.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reason = _why_not_recorded(func, args, kwargs)
        if reason is not None:
            name = func.__name__.partition(".")[0]
            raise InputError(
                f"{name} {reason}, which a graph cannot contain; run the model without graphs"
            )
        return func(*args, **kwargs)


def _why_not_recorded(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    aten = torch.ops.aten
    if torch.Tag.data_dependent_output in func.tags:
        # On a CPU, cached weights are compared with their source.
        on_host = func is aten.equal.default and args[0].device.type == "cpu"
        return None if on_host else "lets the host read a tensor"
    if torch.Tag.dynamic_output_shape in func.tags:
        if func is aten.repeat_interleave.Tensor:
            fixed = kwargs.get("output_size") is not None
        else:
            # Indexing has the size of its indices, unless they are masks.
            fixed = func is aten.index.Tensor and all(
                index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
            )
        return None if fixed else "has a size that depends on values"
    if func is aten.copy_.default and args[1].device != args[0].device:
        return "copies to another device"
    if func is aten._to_copy.default:
        device = kwargs.get("device") or args[0].device
        return None if device == args[0].device else "copies to another device"
    return None


def why_not_captured(module: nn.Module) -> str | None:
    """Return why a module cannot be captured on any device, with the remedy, or None."""
    for path, submodule in module.named_modules():
        if submodule.training:
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


@dataclass(frozen=True)
class Program(Generic[Call]):
    """Work to capture at several sizes; a call is the caller's input after validation."""

    name: str
    size: Callable[[Call], Size]  # size of a call
    buffers: Callable[[Size], Buffers]  # memory that the graph of a size reads, with valid values
    run: Callable[[Size, Buffers], Any]
    fill: Callable[[Call, Size, Buffers], None]  # copies a call, and padding behind it
    result: Callable[[Call, Any], Any]  # copies the outputs of a call


class _Graph(NamedTuple):
    buffers: Buffers
    recording: Recording
    stamp: tuple[int, int]
    graphs_read_cache: list[Any]


class Sizes(Generic[Call]):
    """Graphs of one program, by size."""

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

    def _smallest(self, needed: Size) -> Size:
        """Return the smallest captured size that a call fits."""
        for size in self.sizes:
            if all(count <= limit for count, limit in zip(needed, size, strict=True)):
                return size
        raise InputError(
            f"{self.program.name} needs size {needed}, captured are "
            f"{', '.join(map(str, self.sizes)) or 'no sizes'}; capture it too"
        )

    @torch.no_grad()
    def __call__(self, call: Call) -> Any:
        size = self._smallest(self.program.size(call))
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
    """Captures any module at its first call for each input shape; arguments other than tensors are constants.

    Calls with gradients or in training mode run the module itself.
    """

    def __init__(
        self, run: Callable[..., Any], module: nn.Module, recorder: Recorder | None = None
    ) -> None:
        self.run, self.module = run, module
        self._recorder, self._lock = recorder or record, threading.Lock()
        self._graphs: OrderedDict[Any, Sizes[list[Any]]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        takes_gradients = torch.is_grad_enabled() and any(
            p.requires_grad for p in self.module.parameters()
        )
        if takes_gradients or why_not_captured(self.module) is not None:
            return self.run(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key: list[Any] = [str(structure)]
        for leaf in leaves:
            is_tensor = isinstance(leaf, Tensor)
            key.append((leaf.shape, leaf.dtype, leaf.device) if is_tensor else leaf)
        try:
            shapes = tuple(key)
            hash(shapes)
        except TypeError:
            raise InputError(
                "an argument is neither a tensor nor hashable; call accelerate with cuda_graphs=False"
            ) from None
        with self._lock:
            if shapes not in self._graphs:
                program = _module_program(self.run, leaves, structure)
                self._graphs[shapes] = Sizes(program, self.module, [()], self._recorder)
                if len(self._graphs) > MOST_CALLS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(shapes)
            return self._graphs[shapes](leaves)


def _module_program(
    run: Callable[..., Any], leaves: Sequence[Any], structure: pytree.TreeSpec
) -> Program[list[Any]]:
    """Build the program of a module for arguments of one shape, flattened to leaves."""
    names = {str(i): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}

    def run_on(size: Size, buffers: Buffers) -> Any:
        inputs = list(leaves)
        for name, i in names.items():
            inputs[i] = buffers[name]
        args, kwargs = pytree.tree_unflatten(inputs, structure)
        return run(*args, **kwargs)

    def fill(call: list[Any], size: Size, buffers: Buffers) -> None:
        for name, i in names.items():
            buffers[name].copy_(call[i], non_blocking=True)

    return Program(
        name="the module",
        size=lambda call: (),
        buffers=lambda size: {name: leaves[i].clone() for name, i in names.items()},
        run=run_on,
        fill=fill,
        result=lambda call, outputs: pytree.tree_map_only(Tensor, Tensor.clone, outputs),
    )


@dataclass(frozen=True)
class Shapes:
    """Sizes to capture an X-FM at: up to `texts` texts of up to `length` tokens, of which `tokens` are not padding.

    32 captions padded to 40 have about 512 tokens.
    """

    images: tuple[int, ...] = ()  # batch sizes of `encode_image` and `image_memory`
    texts: tuple[tuple[int, int, int], ...] = ()  # (texts, length, tokens) of `encode_text`
    matches: tuple[tuple[int, int, int, int], ...] = ()  # (images, texts, length, tokens) of `fuse`

    def __post_init__(self) -> None:
        for name, count in (("images", 1), ("texts", 3), ("matches", 4)):
            for entry in getattr(self, name):
                size = entry if isinstance(entry, tuple) else (entry,)
                if len(size) != count or not all(isinstance(n, int) and n > 0 for n in size):
                    raise InputError(
                        f"{name} contains {entry!r}; a size is {count} positive integers"
                    )
        for *_, texts, length, tokens in (*self.texts, *self.matches):
            if tokens > texts * length:
                raise InputError(
                    f"{tokens} tokens exceed {texts} texts of {length}; give at most {texts * length}"
                )


def _image_program(
    name: str, model: XFM, shape: tuple[int, ...], encode: Callable[[Tensor], Any]
) -> Program[Tensor]:
    """Build the program of a call on images `[B, *shape]`; `encode` returns tensors with B rows."""
    like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}

    def fill(images: Tensor, size: Size, buffers: Buffers) -> None:
        buffers["x"][: images.shape[0]].copy_(images, non_blocking=True)

    def result(images: Tensor, outputs: Any) -> Any:
        return pytree.tree_map(lambda rows: rows[: images.shape[0]].clone(), outputs)

    return Program(
        name=name,
        size=lambda images: (images.shape[0],),
        buffers=lambda size: {"x": torch.zeros(*size, *shape, **like)},
        run=lambda size, buffers: encode(buffers["x"]),
        fill=fill,
        result=result,
    )


class _PackedLayout:
    """Layout of packed texts in buffers for `texts` texts of at most `length`, and at most `tokens` in total.

    Real tokens are followed by at least one padding token, in padding texts of at most `length`.
    Empty texts come first, because a read of token 0 of any text must find a token.
    """

    def __init__(self, texts: int, length: int, tokens: int) -> None:
        self.texts, self.length, self.rows = texts, length, tokens + 1
        self.padding_texts = -(-self.rows // length)
        self.sequences = texts + self.padding_texts

    def offsets(self, cu_seqlens: Tensor, used: int) -> Tensor:
        """Extend the offsets of the real texts, which have `used` tokens, to `[sequences + 1]`."""
        int32: dict[str, Any] = {"dtype": torch.int32, "device": cu_seqlens.device}
        unused = torch.full((self.texts + 1 - cu_seqlens.shape[0],), used, **int32)
        following = self.length * torch.arange(self.padding_texts - 1, -1, -1, **int32)
        return torch.cat([cu_seqlens.int(), unused, (self.rows - following).clamp(min=used)])


class _TextCall(NamedTuple):
    ids: Tensor
    packing: Packing


def _text_program(model: XFM) -> Program[_TextCall]:
    """Build the program of `encode_text`; a size is (texts, length, tokens)."""
    device = model.device

    def buffers(size: Size) -> Buffers:
        layout = _PackedLayout(*size)
        first = torch.zeros(1, dtype=torch.int32, device=device)
        return {
            # Token 0 (<s>) is a real token, so padding texts have positions.
            "ids": torch.zeros(layout.sequences, layout.length, dtype=torch.int64, device=device),
            "positions": layout.texts * layout.length + torch.arange(layout.rows, device=device),
            "cu_seqlens": layout.offsets(first, 0),
        }

    def run(size: Size, buffers: Buffers) -> Tensor:
        layout = _PackedLayout(*size)
        packing = Packing(
            cu_seqlens=buffers["cu_seqlens"],
            max_seqlen=layout.length,
            positions=buffers["positions"],
            shape=(layout.sequences, layout.length),
        )
        return packing.unpad(model.text_encoder(buffers["ids"], packing))

    def fill(call: _TextCall, size: Size, buffers: Buffers) -> None:
        layout, positions = _PackedLayout(*size), call.packing.positions
        texts, length = call.ids.shape
        used = positions.shape[0]
        buffers["ids"][:texts, :length].copy_(call.ids, non_blocking=True)
        padded_positions = positions // length * layout.length + positions % length
        buffers["positions"][:used].copy_(padded_positions, non_blocking=True)
        padding = torch.arange(layout.rows - used, device=device)
        buffers["positions"][used:].copy_(layout.texts * layout.length + padding)
        offsets = layout.offsets(call.packing.cu_seqlens, used)
        buffers["cu_seqlens"].copy_(offsets, non_blocking=True)

    def result(call: _TextCall, outputs: Tensor) -> Tensor:
        texts, length = call.ids.shape
        return outputs[:texts, :length].clone()

    def size(call: _TextCall) -> Size:
        return (*call.ids.shape, call.packing.positions.shape[0])

    return Program("encode_text", size, buffers, run, fill, result)


class _PairCall(NamedTuple):
    tokens: Tensor
    packing: Packing
    groups: ImageGroups
    memory: ImageMemory


def _pair_program(model: XFM) -> Program[_PairCall]:
    """Build the program of `fuse`; a size is (images, texts, length, tokens)."""
    config = model.config
    like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    memories = [f"memory {layer}" for layer in range(config.fusion_layers)]

    def buffers(size: Size) -> Buffers:
        images, layout = size[0], _PackedLayout(*size[1:])
        heads = (config.text_heads, config.text_width // config.text_heads)
        offsets = torch.zeros(images, dtype=torch.int32, device=model.device)
        buffers = {
            "tokens": torch.zeros(layout.rows, config.text_width, **like),
            "cu_seqlens": layout.offsets(offsets[:1], 0),
            # Padding texts attend to the last image.
            "cu_texts": torch.cat([offsets, offsets.new_full((1,), layout.sequences)]),
        }
        for name in memories:
            buffers[name] = torch.zeros(images, config.num_image_tokens, 2, *heads, **like)
        return buffers

    def run(size: Size, buffers: Buffers) -> Tensor:
        return model.fusion_encoder(
            buffers["tokens"],
            Sequences(cu_seqlens=buffers["cu_seqlens"], max_seqlen=size[2]),
            ImageMemory(tuple(buffers[name] for name in memories)),
            ImageGroups(buffers["cu_texts"]),
            first_token_only=True,
        )

    def fill(call: _PairCall, size: Size, buffers: Buffers) -> None:
        layout, used, images = _PackedLayout(*size[1:]), call.tokens.shape[0], call.memory.images
        buffers["tokens"][:used].copy_(call.tokens)
        buffers["cu_seqlens"].copy_(layout.offsets(call.packing.cu_seqlens, used))
        cu_texts = buffers["cu_texts"]
        # The order of the texts determines their image; empty slots come before the padding texts.
        cu_texts[:images].copy_(call.groups.cu_texts[:-1])
        cu_texts[images:-1].fill_(call.packing.shape[0])
        for name, layer in zip(memories, call.memory.layers, strict=True):
            buffers[name][:images].copy_(layer)

    def result(call: _PairCall, outputs: Tensor) -> Tensor:
        return call.packing.restore(outputs[: call.packing.shape[0]])[:, None].clone()

    def size(call: _PairCall) -> Size:
        return (call.memory.images, *call.packing.shape, call.tokens.shape[0])

    return Program("fuse", size, buffers, run, fill, result)


@dataclass
class XFMGraphs:
    """The captured encoders of an X-FM, with the methods and arguments of the model.

    Thread-safe: results are copied out before the next replay. Methods raise `InputError` for calls
    that exceed the captured sizes.
    """

    model: XFM
    _images: Sizes[Tensor]
    _memories: Sizes[Tensor]
    _texts: Sizes[_TextCall]
    _pairs: Sizes[_PairCall]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode images `[B, 3, R, R]` to `[B, 1 + N, vision_width]`."""
        inputs.check_pixels(pixels, self.model.config)
        return self._images(pixels)

    def image_memory(self, image_embeds: Tensor) -> ImageMemory:
        """Project images `[B, 1 + N, vision_width]` to keys and values of every fusion layer."""
        config = self.model.config
        if image_embeds.shape[1:] != (config.num_image_tokens, config.vision_width):
            raise InputError(
                f"image embeddings are {[*image_embeds.shape]}, captured are "
                f"[B, {config.num_image_tokens}, {config.vision_width}]; call the model"
            )
        return ImageMemory(self._memories(image_embeds))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode ids `[P, L]` to `[P, L, text_width]`; a mask on the CPU avoids a synchronisation."""
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
        """Fuse texts `[P, L, text_width]` with images: `[P, 1, text_width]`, token 0 of each, as `XFM.fuse` does.

        Args:
            text_embeds: `[P, L, text_width]`.
            attention_mask: `[P, L]`, non-zero for real tokens.
            memory: Images; masked image tokens are not supported.
            image_index: `[P]`, the image of each text.
            first_token_only: Must be True; `XFM.fuse` computes all tokens.

        Raises:
            InputError: There are more pairs than captured, masked image tokens, or texts that do
                not match the images.
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
    """Capture the encoders of an X-FM for inference on a GPU; every size takes memory for its buffers.

    Weights may be changed in place later: the next call captures again.

    Args:
        model: Model in evaluation mode.
        shapes: Sizes to capture.
        recorder: Records the work in place of CUDA, on any device.

    Raises:
        InputError: The model cannot be captured, or has no encoder for a size.
        UnavailableError: The model is not on a GPU.
    """
    if not isinstance(model, XFM):
        raise InputError(
            f"capture() takes an XFM, not {type(model).__name__}; use accelerate(model, cuda_graphs=True)"
        )
    reason = why_not_captured(model)
    if reason is not None:
        raise InputError(reason)
    if recorder is None:
        require_gpu(model)
        recorder = partial(record, pool=torch.cuda.graph_pool_handle())
    config, encoders = model.config, model.encoders
    fuses = config.fusion_layers > 0 and "fusion" in encoders
    has_encoder = {"images": "vision" in encoders, "texts": "text" in encoders, "matches": fuses}
    for name, present in has_encoder.items():
        if getattr(shapes, name) and not present:
            raise InputError(f"the model has no encoder for {name}; leave {name} out")
    pixels = (3, config.image_size, config.image_size)
    tokens = (config.num_image_tokens, config.vision_width)
    encode = _image_program("encode_image", model, pixels, model.encode_image)
    project = _image_program(
        "image_memory", model, tokens, lambda embeds: model.image_memory(embeds).layers
    )
    sizes = [(images,) for images in shapes.images]
    return XFMGraphs(
        model,
        Sizes(encode, model, sizes, recorder),
        Sizes(project, model, sizes if fuses else [], recorder),
        Sizes(_text_program(model), model, shapes.texts, recorder),
        Sizes(_pair_program(model), model, shapes.matches, recorder),
    )
