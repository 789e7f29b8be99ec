"""The encoders of an X-FM as programs of fixed sizes, filled with images and packed texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError
from xfm_fast.graphs.recording import Program, Recorder, Size, Sizes, record, require_gpu, why_not_captured
from xfm_fast.models import inputs
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Packing, Sequences


@dataclass(frozen=True)
class Shapes:
    """The sizes to capture an X-FM at. Each kind may be empty.

    Attributes:
        images: batch sizes, for `encode_image` and `image_memory`.
        texts: (texts, length, tokens), for `encode_text`: up to `texts` texts of up to `length` tokens, and up to
            `tokens` in total without padding. 32 captions padded to 40 have about 512 tokens.
        pairs: (images, texts, length, tokens), for `fuse`.
        matches: the same for `fuse` with `first_token_only`, for match scores and boxes.
    """

    images: tuple[int, ...] = ()
    texts: tuple[tuple[int, int, int], ...] = ()
    pairs: tuple[tuple[int, int, int, int], ...] = ()
    matches: tuple[tuple[int, int, int, int], ...] = ()

    def __post_init__(self) -> None:
        meanings = {
            "images": "a number of images",
            "texts": "(texts, length, tokens)",
            "pairs": "(images, texts, length, tokens)",
            "matches": "(images, texts, length, tokens)",
        }
        for name, meaning in meanings.items():
            for given in getattr(self, name):
                size = given if isinstance(given, tuple) else (given,)
                if len(size) != meaning.count(",") + 1 or not all(isinstance(n, int) and n > 0 for n in size):
                    raise InputError(f"{name} contains {given!r}; a size is {meaning}, in positive integers")
        for *_, texts, length, tokens in (*self.texts, *self.pairs, *self.matches):
            if tokens > texts * length:
                raise InputError(f"{tokens} tokens exceed {texts} texts of {length}; give at most {texts * length}")


class _Images(Program[Tensor]):
    """A call with one row per image, `[B, *shape]`; `encode` returns a tensor or a tuple of them."""

    def __init__(self, name: str, model: XFM, shape: tuple[int, ...], encode: Callable[[Tensor], Any]) -> None:
        self.name, self.model, self.shape, self.encode = name, model, shape, encode

    def needs(self, call: Tensor) -> Size:
        return (call.shape[0],)

    def buffers(self, size: Size) -> dict[str, Tensor]:
        return {"x": torch.zeros(*size, *self.shape, dtype=self.model.dtype, device=self.model.device)}

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
        unused = torch.full((self.texts + 1 - cu_seqlens.shape[0],), used, dtype=torch.int32, device=device)
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
        buffers["positions"][:used].copy_(places // length * layout.length + places % length, non_blocking=True)
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
    def __init__(self, model: XFM, *, first_token_only: bool) -> None:
        self.model, self.first_token_only = model, first_token_only
        self.name = f"fuse(first_token_only={first_token_only})"

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
        layers = tuple(buffers[f"memory {number}"] for number in range(self.model.config.fusion_layers))
        return self.model.fusion_encoder(
            buffers["tokens"], Sequences(cu_seqlens=buffers["cu_seqlens"], max_seqlen=size[2]), ImageMemory(layers),
            ImageGroups(buffers["cu_texts"]), first_token_only=self.first_token_only,
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
        packing = call.packing
        if self.first_token_only:
            return packing.restore(outputs[: packing.shape[0]])[:, None].clone()
        return packing.unpad(outputs[: call.tokens.shape[0]])


@dataclass
class XFMGraphs:
    """The captured encoders of an X-FM, with the methods and arguments of the model.

    Thread-safe: results are copied out before the next replay.
    """

    model: XFM
    _images: Sizes[Tensor]
    _memories: Sizes[Tensor]
    _texts: Sizes[_TextCall]
    _pairs: dict[bool, Sizes[_PairCall]] = field(default_factory=dict)

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
        first_token_only: bool = False,
    ) -> Tensor:
        """`[P, L, text_width]` with the images of `image_index` `[P]` → as `XFM.fuse`.

        Raises `InputError` for more pairs than captured, masked image tokens, or texts that do not match the images.
        """
        if memory.token_mask is not None:
            raise InputError("the memory has masked image tokens, which were not captured; call model.fuse")
        inputs.check_embeddings(text_embeds, self.model.config.text_width, "text embeddings")
        mask = inputs.check_attention_mask(attention_mask, [*text_embeds.shape[:2]])
        texts = text_embeds.shape[0]
        if image_index is None:
            if texts != memory.images:
                raise InputError(f"{texts} texts and {memory.images} images do not pair up; pass image_index")
            image_index = torch.arange(texts, device=text_embeds.device)
        image_index = inputs.check_image_index(image_index, memory.images, texts, "texts")
        groups = ImageGroups.from_index(image_index, memory.images)
        packing = Packing.from_mask(mask.to(text_embeds.device), order=groups.order)
        return self._pairs[first_token_only](_PairCall(packing.pack(text_embeds), packing, groups, memory))


def capture(model: XFM, shapes: Shapes, *, recorder: Recorder | None = None) -> XFMGraphs:
    """Capture the encoders of an X-FM at some sizes, for inference.

    Weights may be changed in place later: the next call captures again.

    Args:
        model: on a GPU, in evaluation mode.
        shapes: the sizes; each takes memory for its inputs and outputs.
        recorder: records the work; by default as a CUDA graph.

    Raises:
        InputError: the model cannot be captured, with the reason and the remedy.
        UnavailableError: the model is not on a GPU.
    """
    if not isinstance(model, XFM):
        raise InputError(f"capture() takes an XFM, not {type(model).__name__}; use accelerate(model, cuda_graphs=True)")
    why_not = why_not_captured(model)
    if why_not is not None:
        raise InputError(why_not)
    if recorder is None:
        require_gpu(model)
        recorder = partial(record, pool=torch.cuda.graph_pool_handle())
    fused = model.config.fusion_layers > 0 and "fusion" in model.encoders
    lacking = {
        "images": "vision" in model.encoders,
        "texts": "text" in model.encoders,
        "pairs": fused,
        "matches": fused,
    }
    for name, present in lacking.items():
        if getattr(shapes, name) and not present:
            raise InputError(f"the model has no encoder for {name}; leave {name} out")
    images, config = [(size,) for size in shapes.images], model.config
    pixels, tokens = (3, config.image_size, config.image_size), (config.num_image_tokens, config.vision_width)
    encode = _Images("encode_image", model, pixels, model.encode_image)
    project = _Images("image_memory", model, tokens, lambda embeds: model.image_memory(embeds).layers)
    return XFMGraphs(
        model,
        Sizes(encode, model, images, recorder),
        Sizes(project, model, images if fused else [], recorder),
        Sizes(_Texts(model), model, shapes.texts, recorder),
        {
            only: Sizes(_Pairs(model, first_token_only=only), model, sizes, recorder)
            for only, sizes in ((False, shapes.pairs), (True, shapes.matches))
        },
    )
