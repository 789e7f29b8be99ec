"""Recording of the encoders' intermediate results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from xfm_fast import XFM
from xfm_fast.models.fusion import FusionEncoder
from xfm_fast.models.text import TextEncoder
from xfm_fast.packing import Packing, Sequences


@dataclass
class HiddenStates:
    """Intermediate results of the encoders, in the order of computation."""

    # [B, 1 + N, vision_width] embeddings, class token first, and the output of every block
    vision: list[Tensor] = field(default_factory=list)
    # [B, L, text_width] embeddings and the output of every layer, zeros at padding
    text: list[Tensor] = field(default_factory=list)
    # [P, L, text_width] output of every layer that computes whole texts, zeros at padding
    fusion: list[Tensor] = field(default_factory=list)


@contextmanager
def record_hidden_states(model: XFM) -> Iterator[HiddenStates]:
    """Record the intermediate results of `encode_image`, `encode_text` and `fuse` in a `with` block."""
    states = HiddenStates()

    def after_block(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        states.vision.append(out)

    with ExitStack() as undo:
        if hasattr(model, "vision_encoder"):
            blocks = model.vision_encoder.blocks
            hook = blocks[0].register_forward_pre_hook(
                lambda _, args: states.vision.append(args[0])
            )
            undo.callback(hook.remove)
            for block in blocks:
                undo.callback(block.register_forward_hook(after_block).remove)
        if hasattr(model, "text_encoder"):
            _record_texts(model.text_encoder, states.text, undo)
        if hasattr(model, "fusion_encoder"):
            _record_texts(model.fusion_encoder, states.fusion, undo)
        yield states


def _record_texts(
    encoder: TextEncoder | FusionEncoder, states: list[Tensor], undo: ExitStack
) -> None:
    packings: list[Sequences] = []

    def record(module: nn.Module, args: object, packed: Tensor) -> None:
        packing = packings[-1]
        # The output of a last layer that computes only reads does not fit the padded batch.
        if isinstance(packing, Packing) and packed.shape[0] == packing.positions.shape[0]:
            states.append(packing.unpad(packed))

    def recorded(feed_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        out = feed_forward(x)
        record(encoder, (), out)
        return out

    hook = encoder.register_forward_pre_hook(lambda _, args: packings.append(args[1]))
    undo.callback(hook.remove)
    if isinstance(encoder, TextEncoder):
        undo.callback(encoder.roberta.embeddings.register_forward_hook(record).remove)
    for layer in encoder.roberta.encoder:
        # Text layers are called by their methods, which hooks do not see; this is the last one.
        attributes = vars(layer)
        former = attributes.get("feed_forward")
        if former is None:
            undo.callback(attributes.pop, "feed_forward")
        else:
            undo.callback(attributes.update, feed_forward=former)
        attributes["feed_forward"] = partial(recorded, layer.feed_forward)
