"""The reference: the model's own results on a few images and captions, stored with an export to judge it.

Engines can be compared on a machine without checkpoint and photographs. The file holds the fp32 results of the unpadded
model, and the error of the same model in the dtype of the export, which bounds what an export of that dtype can reach.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xfm_fast.checkpoint.files import write_safetensors
from xfm_fast.config import XFMConfig
from xfm_fast.errors import ExportError, InputError
from xfm_fast.io import write_files
from xfm_fast.kernels.caching import uncached
from xfm_fast.models.decoder import DecoderCache
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Packing
from xfm_fast.tasks.models import TaskModel

from .graphs import DTYPES, M, in_dtype, memory_names
from .request import DType, GraphName

REFERENCE_FILE = "reference.safetensors"

LONGEST = 40
"""Tokens of the longest text that exports are compared on, the official limit of captions."""

DECODER_GRAPHS: frozenset[GraphName] = frozenset(("decoder_memory", "decoder_step"))

# States and texts that a decoder is compared on, and tokens of each: logits over a vocabulary are large.
_STATES, _WRITTEN = 3, 6
_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, LONGEST)
_ROUNDING = "rounding."


@dataclass(frozen=True)
class Examples:
    """Images and captions to compare on."""

    pixels: Tensor  # [I, 3, R, R] fp32, normalised
    input_ids: Tensor  # [T, L], captions of many lengths
    attention_mask: Tensor
    origin: str  # for reports


def make_examples(
    pixels: Tensor,
    rows: Sequence[Sequence[int]],
    config: XFMConfig,
    *,
    origin: str,
    longest: int = LONGEST,
) -> Examples:
    """Examples from images and token ids; the first captions are cut or extended to lengths from 1 to `longest`."""
    if not len(pixels) or not len(rows):
        raise InputError(
            f"{len(pixels)} images and {len(rows)} texts are nothing to compare on; give at least one each"
        )
    longest = min(longest, config.max_text_length)
    lengths = sorted({min(length, longest) for length in _LENGTHS})
    texts = []
    for number, row in enumerate(rows):
        ids = list(row[:longest])
        if number < len(lengths):
            following = [
                token for later in (*rows[number:], *rows[:number]) for token in later[1:-1]
            ]
            inner = following * (1 + longest // max(len(following), 1))
            ids = [row[0], *inner[: max(lengths[number] - 2, 0)], row[-1]][: lengths[number]]
        texts.append(ids)
    return Examples(pixels.float(), *padded_texts(texts, config.pad_token_id), origin)


def padded_texts(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids `[T, L]` and mask `[T, L]` of captions, padded to the longest."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def generated_examples(
    config: XFMConfig, *, images: int = 4, texts: int = 32, longest: int = LONGEST, seed: int = 0
) -> Examples:
    """Examples without photographs: smooth noise, and random ids of 8 to 20 tokens."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(images, 3, 4, 4, generator=generator)
    size = (config.image_size, config.image_size)
    pixels = torch.nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=False)
    rows = []
    for _ in range(texts):
        length = int(torch.randint(6, 19, (), generator=generator))
        ids = torch.randint(4, config.mask_token_id, (length,), generator=generator)
        rows.append([config.bos_token_id, *ids.tolist(), config.eos_token_id])
    return make_examples(
        pixels, rows, config, origin=f"generated images and texts (seed {seed})", longest=longest
    )


def reference_bytes(
    config: XFMConfig, *, images: int = 4, texts: int = 48, decodes: bool = False
) -> int:
    """Approximate size of a reference on disk; `decodes` includes the logits of a decoder."""
    tokens, width = config.num_image_tokens, config.text_width
    memory = 2 * config.fusion_layers * tokens * width
    of_images = images * (3 * config.image_size**2 + tokens * config.vision_width + texts * width)
    logits = _STATES * _STATES * _WRITTEN * config.vocab_size if decodes else 0
    return 4 * (memory + of_images + texts * LONGEST * width + logits)


@dataclass(frozen=True)
class Reference:
    """Inputs and the model's results by name, and the model's own rounding error in the export's dtype."""

    # pixels, input_ids, attention_mask; depending on the graphs: image_embeds [I, M, Dv], image_feature, text_embeds
    # [T, L, Dt], text_feature, memory_keys_<layer> and memory_values_<layer> of image 0; for every image and caption
    # fused [I, T, Dt], match_logits, boxes, scores; of image 0 fused_tokens [1, T, L, Dt]; class_logits of images,
    # captions or pairs. Of a decoder: states [S, M, D], memory_mask [S, M], decoder_keys_<layer> and values, tokens
    # [R, N], step_logits [S, R, N, vocabulary], present [S, R, N, layers, 2, H, D].
    tensors: dict[str, Tensor]
    rounding: dict[str, float]  # largest error of the model in the export's dtype, by tensor

    @property
    def images(self) -> int:
        return self.tensors["pixels"].shape[0]

    @property
    def texts(self) -> int:
        return self.tensors["input_ids"].shape[0]

    def save(self, folder: Path) -> None:
        """Write `reference.safetensors` atomically."""
        numbers = {
            f"{_ROUNDING}{name}": torch.tensor(value).double()
            for name, value in self.rounding.items()
        }
        content = self.tensors | numbers
        write_files({folder / REFERENCE_FILE: lambda file: write_safetensors(file, content)})

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Read the reference of an export; raises `ExportError` where it is missing or damaged."""
        path = folder / REFERENCE_FILE
        try:
            content = load_file(path)
        except FileNotFoundError:
            raise ExportError(
                f"{folder} has no {REFERENCE_FILE} to compare with; export again"
            ) from None
        except Exception as error:  # the library raises errors of its own
            raise ExportError(
                f"{path} is damaged ({error}); copy the folder again or export again"
            ) from None
        rounding = {
            name.removeprefix(_ROUNDING): float(value)
            for name, value in content.items()
            if name.startswith(_ROUNDING)
        }
        return cls(
            {name: value for name, value in content.items() if not name.startswith(_ROUNDING)},
            rounding,
        )


def make_reference(
    model: XFM,
    examples: Examples,
    graphs: Iterable[GraphName],
    dtype: DType,
    *,
    all_tokens: bool = False,
) -> Reference:
    """Run the model, unpadded, in fp32 and in the dtype of the export; computes only the outputs of `graphs`."""
    wanted = frozenset(graphs)
    truth = _model_results(model, torch.float32, examples, wanted, all_tokens)
    inputs = {
        "pixels": examples.pixels.clone(),
        "input_ids": examples.input_ids.long(),
        "attention_mask": examples.attention_mask.long(),
    }
    rounding = {}
    if dtype != "fp32":
        rounded = _model_results(model, DTYPES[dtype], examples, wanted, all_tokens)
        rounding = {
            name: float((rounded[name] - value).abs().max()) for name, value in truth.items()
        }
    return Reference(inputs | {name: value.contiguous() for name, value in truth.items()}, rounding)


@torch.no_grad()
@uncached()
def _model_results(
    model: XFM, dtype: torch.dtype, examples: Examples, wanted: frozenset[str], all_tokens: bool
) -> dict[str, Tensor]:
    training = model.training
    model.eval()
    found: dict[str, Tensor] = {}
    try:
        if wanted - {"text"}:
            found |= _image_results(_part(model, "vision_encoder", dtype), examples, wanted)
        if wanted - {"vision", "image_memory"} and hasattr(model, "text_encoder"):
            found |= _text_results(_part(model, "text_encoder", dtype), examples, wanted)
        own = wanted & {*model.own_graphs} if isinstance(model, TaskModel) else frozenset()
        if own or wanted & {"image_memory", "fusion"}:
            memory = _part(model, "fusion_encoder", dtype).image_memory(found["image_embeds"][:1])
            found |= graph_memory(memory)
        reads = (
            model.decoder_reads
            if wanted & DECODER_GRAPHS and isinstance(model, TaskModel)
            else None
        )
        if wanted & {"fusion", "match"} or reads == "fusion":
            whole = reads == "fusion" or (all_tokens and "fusion" in wanted)
            found |= _fusion_results(
                _part(model, "fusion_encoder", dtype), found, examples.attention_mask, whole
            )
        if own and isinstance(model, TaskModel):
            # The memory of other images than the first comes from `image_memory`.
            images = examples.pixels if "image_memory" in wanted else examples.pixels[:1]
            whole_model = in_dtype(model, dtype)
            found |= whole_model.graph_results(images, examples.input_ids, examples.attention_mask)
        if reads is not None:
            found |= _decoder_results(_part(model, "text_decoder", dtype), reads, found, examples)
        if not own and not wanted & {"fusion", "text"}:
            found.pop("text_embeds", None)
    finally:
        model.train(training)
    return {
        name: value.float() if value.is_floating_point() else value for name, value in found.items()
    }


def _part(model: M, large: str, dtype: torch.dtype) -> M:
    """The model in a dtype with one of its encoders or decoders, to limit the copy of the weights."""
    part = copy.copy(model)
    part._modules = {
        name: child
        for name, child in model.named_children()
        if name == large or not name.endswith(("_encoder", "_decoder"))
    }
    return in_dtype(part, dtype)


def _image_results(model: XFM, examples: Examples, wanted: frozenset[str]) -> dict[str, Tensor]:
    found = {"image_embeds": model.encode_image(examples.pixels)}
    if "vision" in wanted and "contrastive" in model.heads:
        found["image_feature"] = model.project_image(found["image_embeds"])
    if getattr(model, "modality", None) == "image":
        found["class_logits"] = cast(Any, model).logits(examples.pixels)
    return found


def _text_results(model: XFM, examples: Examples, wanted: frozenset[str]) -> dict[str, Tensor]:
    texts = examples.input_ids, examples.attention_mask
    found = {"text_embeds": model.encode_text(*texts)}
    if "text" in wanted and "contrastive" in model.heads:
        found["text_feature"] = model.project_text(found["text_embeds"])
    if getattr(model, "modality", None) == "text":
        found["class_logits"] = cast(Any, model).logits(None, *texts)
    return found


def graph_memory(memory: ImageMemory) -> dict[str, Tensor]:
    """The memory of images as graphs take it: keys and values `[B, H, M, D]` of every layer, by name."""
    parts = [part.transpose(1, 2) for layer in memory.layers for part in layer.unbind(2)]
    return dict(zip(memory_names(len(memory.layers)), parts, strict=True))


def _fusion_results(
    model: XFM, found: dict[str, Tensor], mask: Tensor, all_tokens: bool
) -> dict[str, Tensor]:
    embeds = found["text_embeds"]
    heads = {
        "matching": ("match_logits", model.match_logits),
        "boxes": ("boxes", model.predict_boxes),
    }
    offered: dict[str, Callable[[Tensor], Tensor]] = dict(
        heads[head] for head in heads if head in model.heads
    )
    if getattr(model, "modality", None) == "pair":
        offered["class_logits"] = lambda fused: cast(Any, model).cls_head(fused[:, 0])
    results: dict[str, list[Tensor]] = {"fused": [], **{name: [] for name in offered}}
    whole: dict[str, Tensor] = {}
    # Image by image: the memory of one at a time, as re-ranking does it.
    for number in range(len(found["image_embeds"])):
        memory = model.image_memory(found["image_embeds"][number : number + 1])
        index = torch.zeros(len(embeds), dtype=torch.long)
        fused = model.fuse(embeds, mask, memory, index, first_token_only=True)
        results["fused"].append(fused[:, 0])
        for name, head in offered.items():
            results[name].append(head(fused))
        if all_tokens and number == 0:
            whole["fused_tokens"] = model.fuse(embeds, mask, memory, index)[None]
    stacked = {name: torch.stack(values) for name, values in results.items()}
    if "match_logits" in stacked:
        stacked["scores"] = stacked["match_logits"][..., 1]
    return stacked | whole


def _decoder_results(
    model: Any, reads: str, found: dict[str, Tensor], examples: Examples
) -> dict[str, Tensor]:
    """A few decoder states, and teacher-forced steps of a few captions from each of them."""
    if reads == "fusion":
        mask = examples.attention_mask[:_STATES].bool()
        longest = int(mask.sum(1).max())
        states, mask = found["fused_tokens"][0, :_STATES, :longest], mask[:, :longest]
    else:
        states = found["image_embeds"][:_STATES]
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
    decoder, count = model.text_decoder, len(states)
    lengths = examples.attention_mask.sum(1)
    rows = lengths.topk(min(_STATES, len(lengths))).indices
    written = min(_WRITTEN, int(lengths[rows].min()))
    tokens = examples.input_ids[rows, :written]
    every = tokens.repeat(count, 1)
    groups = ImageGroups(torch.arange(count + 1) * len(tokens))
    memory, past = decoder.memory(states, mask), DecoderCache(written)
    packing = Packing.from_mask(torch.ones_like(every))
    logits = decoder.logits(decoder(every, packing, memory, groups, past=past))
    layers = len(decoder.roberta.encoder)
    known = [past.known(layer, torch.arange(len(every))) for layer in range(layers)]
    present = torch.stack([torch.stack(each, 2) for each in known], 2)
    made = {"states": states, "memory_mask": mask.long(), "tokens": tokens}
    parts: list[Tensor] = []
    for layer in memory.layers:
        padded = layer.new_zeros(*mask.shape, *layer.shape[1:])
        padded[mask] = layer
        parts += [part.transpose(1, 2) for part in padded.unbind(2)]
    made |= dict(zip(memory_names(layers, "decoder"), parts, strict=True))
    shape = (count, len(tokens), written)
    return made | {
        "step_logits": logits.view(*shape, -1),
        "present": present.view(*shape, layers, *present.shape[3:]),
    }
