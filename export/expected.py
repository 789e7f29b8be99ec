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

from .graphs import DTYPES, in_dtype, memory_names
from .layers import M
from .manifest import Manifest, record_files
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
    """Make examples of images and token ids; the first captions are cut or extended to lengths from 1 to `longest`."""
    if not len(pixels) or not len(rows):
        raise InputError(
            f"{len(pixels)} images and {len(rows)} texts are nothing to compare on; give at least one each"
        )
    longest = min(longest, config.max_text_length)
    texts = [list(row[:longest]) for row in rows]
    lengths = sorted({min(length, longest) for length in _LENGTHS})
    for index, (row, length) in enumerate(zip(rows, lengths, strict=False)):
        following = [token for later in (*rows[index:], *rows[:index]) for token in later[1:-1]]
        inner = following * (1 + longest // max(len(following), 1))
        texts[index] = [row[0], *inner[: max(length - 2, 0)], row[-1]][:length]
    return Examples(pixels.float(), *pad_texts(texts, config.pad_token_id), origin)


def pad_texts(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Pad captions to the longest; returns ids `[T, L]` and mask `[T, L]`."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def generated_examples(
    config: XFMConfig, *, images: int = 4, texts: int = 32, longest: int = LONGEST, seed: int = 0
) -> Examples:
    """Generate examples without photographs: smooth noise, and random ids of 8 to 20 tokens."""
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
    """Estimate the size of a reference on disk; `decodes` includes the logits of a decoder."""
    tokens, width = config.num_image_tokens, config.text_width
    memory = 2 * config.fusion_layers * tokens * width
    image = 3 * config.image_size**2 + tokens * config.vision_width + texts * width
    logits = _STATES * _STATES * _WRITTEN * config.vocab_size if decodes else 0
    return 4 * (memory + images * image + texts * LONGEST * width + logits)


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
        content = dict(self.tensors)
        for name, error in self.rounding.items():
            content[f"{_ROUNDING}{name}"] = torch.tensor(error).double()
        write_files({folder / REFERENCE_FILE: lambda file: write_safetensors(file, content)})

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Read the reference of an export; raises `ExportError` if it is missing or damaged."""
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
        errors = [name for name in content if name.startswith(_ROUNDING)]
        rounding = {name.removeprefix(_ROUNDING): float(content.pop(name)) for name in errors}
        return cls(content, rounding)


def make_reference(
    model: XFM,
    examples: Examples,
    graphs: Iterable[GraphName],
    dtype: DType,
    *,
    all_tokens: bool = False,
) -> Reference:
    """Run the model, unpadded, in fp32 and in the dtype of the export; computes only the outputs of `graphs`."""
    names = frozenset(graphs)
    truth = _model_results(model, torch.float32, examples, names, all_tokens)
    tensors = {
        "pixels": examples.pixels.clone(),
        "input_ids": examples.input_ids.long(),
        "attention_mask": examples.attention_mask.long(),
        **{name: value.contiguous() for name, value in truth.items()},
    }
    rounding = {}
    if dtype != "fp32":
        rounded = _model_results(model, DTYPES[dtype], examples, names, all_tokens)
        for name, value in truth.items():
            rounding[name] = float((rounded[name] - value).abs().max())
    return Reference(tensors, rounding)


def keep_results(
    manifest: Manifest, folder: Path, model: XFM, examples: Examples | None = None
) -> Reference:
    """Write the reference of the model into the folder of an export."""
    longest = manifest.fixed.get("length", LONGEST)
    examples = generated_examples(model.config, longest=longest) if examples is None else examples
    reference = make_reference(
        model, examples, manifest.graph_names, manifest.dtype, all_tokens=manifest.all_tokens
    )
    manifest.examples = examples.origin
    keep_reference(manifest, folder, reference)
    return reference


def keep_reference(manifest: Manifest, folder: Path, reference: Reference) -> None:
    """Write the reference into the folder of an export and its list of files."""
    reference.save(folder)
    files = [record for record in manifest.files if record.name != REFERENCE_FILE]
    manifest.files = files + record_files(folder, [REFERENCE_FILE])


@torch.no_grad()
@uncached()
def _model_results(
    model: XFM, dtype: torch.dtype, examples: Examples, graphs: frozenset[str], all_tokens: bool
) -> dict[str, Tensor]:
    """Run the encoders, the task and the decoder that the graphs are made of; floating results are in fp32."""
    training = model.training
    model.eval()
    results: dict[str, Tensor] = {}
    task = model if isinstance(model, TaskModel) else None
    task_graphs = graphs & {*task.own_graphs} if task else frozenset()
    reads = task.decoder_reads if task and graphs & DECODER_GRAPHS else None
    try:
        if graphs - {"text"}:
            encoder = _with_one_encoder(model, "vision_encoder", dtype)
            results |= _image_results(encoder, examples, graphs)
        if graphs - {"vision", "image_memory"} and hasattr(model, "text_encoder"):
            encoder = _with_one_encoder(model, "text_encoder", dtype)
            results |= _text_results(encoder, examples, graphs)
        if task_graphs or graphs & {"image_memory", "fusion"}:
            encoder = _with_one_encoder(model, "fusion_encoder", dtype)
            results |= graph_memory(encoder.image_memory(results["image_embeds"][:1]))
        if graphs & {"fusion", "match"} or reads == "fusion":
            all_tokens = reads == "fusion" or (all_tokens and "fusion" in graphs)
            encoder = _with_one_encoder(model, "fusion_encoder", dtype)
            results |= _fusion_results(encoder, results, examples.attention_mask, all_tokens)
        if task and task_graphs:
            # The memory of other images than the first comes from `image_memory`.
            images = examples.pixels if "image_memory" in graphs else examples.pixels[:1]
            converted = in_dtype(task, dtype)
            results |= converted.graph_results(images, examples.input_ids, examples.attention_mask)
        if reads is not None:
            decoder = _with_one_encoder(model, "text_decoder", dtype)
            results |= _decoder_results(decoder, reads, results, examples)
        if not task_graphs and not graphs & {"fusion", "text"}:
            results.pop("text_embeds", None)
    finally:
        model.train(training)
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in results.items()
    }


def _with_one_encoder(model: M, encoder: str, dtype: torch.dtype) -> M:
    """Convert a model without its other encoders and decoders, to limit the copy of the weights."""
    reduced = copy.copy(model)
    reduced._modules = {
        name: child
        for name, child in model.named_children()
        if name == encoder or not name.endswith(("_encoder", "_decoder"))
    }
    return in_dtype(reduced, dtype)


def _image_results(model: XFM, examples: Examples, graphs: frozenset[str]) -> dict[str, Tensor]:
    results = {"image_embeds": model.encode_image(examples.pixels)}
    if "vision" in graphs and "contrastive" in model.heads:
        results["image_feature"] = model.project_image(results["image_embeds"])
    if getattr(model, "modality", None) == "image":
        results["class_logits"] = cast(Any, model).logits(examples.pixels)
    return results


def _text_results(model: XFM, examples: Examples, graphs: frozenset[str]) -> dict[str, Tensor]:
    texts = examples.input_ids, examples.attention_mask
    results = {"text_embeds": model.encode_text(*texts)}
    if "text" in graphs and "contrastive" in model.heads:
        results["text_feature"] = model.project_text(results["text_embeds"])
    if getattr(model, "modality", None) == "text":
        results["class_logits"] = cast(Any, model).logits(None, *texts)
    return results


def graph_memory(memory: ImageMemory) -> dict[str, Tensor]:
    """Convert the memory of images to inputs of graphs: keys and values `[B, H, M, D]` of every layer, by name."""
    tensors = [side.transpose(1, 2) for layer in memory.layers for side in layer.unbind(2)]
    return dict(zip(memory_names(len(memory.layers)), tensors, strict=True))


def _fusion_results(
    model: XFM, embedded: dict[str, Tensor], mask: Tensor, all_tokens: bool
) -> dict[str, Tensor]:
    """Fuse every caption with every image; `fused_tokens` only of image 0."""
    texts, images = embedded["text_embeds"], embedded["image_embeds"]
    heads: dict[str, Callable[[Tensor], Tensor]] = {}
    if "matching" in model.heads:
        heads["match_logits"] = model.match_logits
    if "boxes" in model.heads:
        heads["boxes"] = model.predict_boxes
    if getattr(model, "modality", None) == "pair":
        heads["class_logits"] = lambda fused: cast(Any, model).cls_head(fused[:, 0])
    by_image: dict[str, list[Tensor]] = {name: [] for name in ("fused", *heads)}
    index = torch.zeros(len(texts), dtype=torch.long)
    fused_tokens: dict[str, Tensor] = {}
    # The memory of one image at a time, as in re-ranking.
    for image in images.split(1):
        memory = model.image_memory(image)
        fused = model.fuse(texts, mask, memory, index, first_token_only=True)
        by_image["fused"].append(fused[:, 0])
        for name, head in heads.items():
            by_image[name].append(head(fused))
        if all_tokens and not fused_tokens:
            fused_tokens["fused_tokens"] = model.fuse(texts, mask, memory, index)[None]
    results = {name: torch.stack(values) for name, values in by_image.items()}
    if "match_logits" in results:
        results["scores"] = results["match_logits"][..., 1]
    return results | fused_tokens


def _decoder_results(
    model: Any, reads: str, embedded: dict[str, Tensor], examples: Examples
) -> dict[str, Tensor]:
    """Decode a few captions, teacher-forced, from each of a few states."""
    if reads == "fusion":
        mask = examples.attention_mask[:_STATES].bool()
        longest = int(mask.sum(1).max())
        states, mask = embedded["fused_tokens"][0, :_STATES, :longest], mask[:, :longest]
    else:
        states = embedded["image_embeds"][:_STATES]
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
    decoder, count = model.text_decoder, len(states)
    lengths = examples.attention_mask.sum(1)
    rows = lengths.topk(min(_STATES, len(lengths))).indices
    written = min(_WRITTEN, int(lengths[rows].min()))
    tokens = examples.input_ids[rows, :written]
    repeated = tokens.repeat(count, 1)
    groups = ImageGroups(torch.arange(count + 1) * len(tokens))
    memory, past = decoder.memory(states, mask), DecoderCache(written)
    packing = Packing.from_mask(torch.ones_like(repeated))
    logits = decoder.logits(decoder(repeated, packing, memory, groups, past=past))
    layers = len(decoder.roberta.encoder)
    cached = [past.known(layer, torch.arange(len(repeated))) for layer in range(layers)]
    present = torch.stack([torch.stack(pair, 2) for pair in cached], 2)
    sides: list[Tensor] = []
    for layer in memory.layers:
        padded = layer.new_zeros(*mask.shape, *layer.shape[1:])
        padded[mask] = layer
        sides += [side.transpose(1, 2) for side in padded.unbind(2)]
    shape = (count, len(tokens), written)
    return {
        "states": states,
        "memory_mask": mask.long(),
        "tokens": tokens,
        **dict(zip(memory_names(layers, "decoder"), sides, strict=True)),
        "step_logits": logits.view(*shape, -1),
        "present": present.view(*shape, layers, *present.shape[3:]),
    }
