"""One interface over exported graphs with the names of the model: `Retriever(session)` works as with an `XFM`.

Sessions sort captions by length and pad them in small groups, split batches to the sizes of a profile, and divide pairs
of captions and images into passes of the fusion graph.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xfm_fast.checkpoint.files import TASK_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.errors import ExportError, InputError, UnavailableError, XFMError, explain_types
from xfm_fast.io import read_json
from xfm_fast.models import inputs as checks
from xfm_fast.models.processor import XFMProcessor, find_tokenizer
from xfm_fast.packing import ImageGroups, Packing, Sequences, offsets

from ..graphs import DTYPES, GraphName
from ..manifest import MANIFEST_FILE, Manifest
from ..request import Precision
from ..runtimes import LoadedGraph, Runtime, choose_runtime, first_line, open_runtime
from ..slots import (
    TORCH_DTYPES,
    Layout,
    Pass,
    PassLimits,
    Slot,
    choose_slot,
    empty_tensors,
    graph_slots,
    largest,
    pad_tensor,
    plan_passes,
    request_sizes,
    trim_tensor,
)

# Padded tokens of a pass, the price of a pass in tokens, and the step of lengths. A pass reads all weights of an
# encoder and cuts the memory into layers, which takes a CPU as long as some dozens of tokens. A GPU profits from few
# shapes.
_LIMITS = {
    "cpu": PassLimits(budget=2048, pass_tokens=32),
    "cuda": PassLimits(budget=32768, pass_tokens=512, step=8),
}

# Inputs that are filled up with the token of padding.
_PADDED = ("input_ids", "packed_ids")
_IDS = (*_PADDED, "token_ids")


@dataclass(frozen=True)
class SessionMemory:
    """Keys and values `[B, H, M, D]` of every fusion layer for B images, by the names of the graph's inputs.

    Or of every decoder layer for B states, with their mask `[B, M]` where lengths differ.
    """

    layers: Mapping[str, Tensor]
    mask: Tensor | None = None

    @property
    def images(self) -> int:
        return self._first.shape[0]

    @property
    def states(self) -> int:
        return self._first.shape[0]

    @property
    def tokens(self) -> int:
        return self._first.shape[2]

    @property
    def _first(self) -> Tensor:
        return next(iter(self.layers.values()))

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs of the graph that reads it."""
        return {**self.layers, **({} if self.mask is None else {"memory_mask": self.mask})}

    def select(self, index: Tensor | slice) -> SessionMemory:
        """The memory of some of the images or states; a slice shares storage."""
        if not isinstance(index, slice):
            index = index.to(self._first.device)

        def chosen(value: Tensor) -> Tensor:
            return (
                value[index]
                if isinstance(index, slice)
                else value.index_select(0, index.to(value.device))
            )

        layers = {name: chosen(layer) for name, layer in self.layers.items()}
        return SessionMemory(layers, None if self.mask is None else chosen(self.mask))

    def part(self, start: int, stop: int) -> SessionMemory:
        """The states from `start` to `stop`, without a copy."""
        return self.select(slice(start, stop))

    def rows(self, rows: Sequence[int]) -> SessionMemory:
        """Some of the images; consecutive ones share storage."""
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return self.part(rows[0], rows[0] + len(rows))
        return self.select(torch.tensor(rows))

    @classmethod
    def joined(cls, memories: Sequence[SessionMemory]) -> SessionMemory:
        """The images of several memories, concatenated."""
        if len(memories) == 1:
            return memories[0]
        return cls(
            {
                name: torch.cat([each.layers[name] for each in memories])
                for name in memories[0].layers
            }
        )


class Session:
    """Runs the graphs of an export folder with the methods of the model. Use `Session.load`.

    Several threads may call a session: ONNX Runtime runs their calls in parallel, other runtimes serialise calls of the
    same graph. Load and warm up in one thread; the constructor reads no graph, `warm_up` does.

    Attributes:
        manifest: The export's `manifest.json`.
        config: Sizes of the model.
        device: Device of the results; inputs are moved there.
        dtype: Dtype of embeddings and results.
        limits: Sizes of the passes of captions.
        task: The task of `predict`, set by its first call.
    """

    def __init__(
        self,
        folder: str | Path,
        runtime: str | Runtime = "auto",
        device: torch.device | str | None = None,
        *,
        precision: Precision | None = None,
        verify_files: bool = True,
        manifest: Manifest | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = (
            Manifest.load(self.folder, check_files=verify_files) if manifest is None else manifest
        )
        self.config: XFMConfig = self.manifest.xfm_config
        if isinstance(runtime, str):
            name = choose_runtime(self.manifest, self.folder) if runtime == "auto" else runtime
            runtime = open_runtime(name, self.manifest, device, precision)
            self.manifest.require_files(self.folder)
        self.runtime: Runtime = runtime
        self.device: torch.device = self.runtime.device
        self.dtype: torch.dtype = DTYPES[self.manifest.dtype]
        self._graphs: dict[GraphName, LoadedGraph] = {}
        try:
            self._slots = {record.name: graph_slots(record) for record in self.manifest.graphs}
        except (LookupError, TypeError, ValueError) as error:
            raise ExportError(
                f"{MANIFEST_FILE} in {folder} describes inputs that no graph has ({type(error).__name__}: {error}); "
                "export again"
            ) from None
        self._ready = False
        self.task: Any = None
        self.limits = _LIMITS["cpu" if self.device.type == "cpu" else "cuda"]
        # Further outputs of the graph that computed an embedding, for the lifetime of the embedding.
        self._carried: Any = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    @classmethod
    @explain_types
    def load(
        cls,
        folder: str | Path,
        runtime: str = "auto",
        device: torch.device | str | None = None,
        *,
        precision: Precision | None = None,
        verify_files: bool = True,
    ) -> Self:
        """Load an export and run every graph once in every profile.

        The session of a fine-tuned model has the methods of its task.

        Args:
            folder: An export.
            runtime: A name of `xfm_fast.export.runtimes.runtimes()`, or `auto` for the runtime of the export. `auto` is
                never `aoti`: loading a package runs native code, so name it for packages that you trust. Treat TensorRT
                engines with the same care.
            device: `cpu`, `cuda` or `cuda:1`; by default a GPU where runtime and machine have one.
            precision: Dtype of the arithmetic, where the runtime offers it for fp32 exports; by default the export's.
            verify_files: Compare sizes and checksums of all files with the manifest, which reads them once more.

        Raises:
            ExportError: The files differ from the manifest, the export failed verification, it is for another runtime,
                version or GPU, it holds packages without `runtime="aoti"`, or a graph does not load.
            UnavailableError: The runtime is not installed, or lacks the device or dtype.
        """
        made = cast("type[Self]", _class_of(Path(folder))) if cls is Session else cls
        session = made(folder, runtime, device, precision=precision, verify_files=verify_files)
        if session.manifest.status == "failed":
            raise ExportError(
                f"{folder} differs from the model that it was made from ({session.manifest.reason}); export it again, "
                "in another dtype or for another consumer"
            )
        session.warm_up()
        return session

    def predict(
        self, images: Sequence[str | Path] = (), texts: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Answers for image files and texts, as `xfm_fast.load(folder).predict` returns them.

        Args:
            images: Image files.
            texts: Questions, sentences or captions, paired with the images as the task does.

        Returns:
            A row per answer, as the exported run returns it.

        Raises:
            ExportError: The exported model has no task, or one without support in exports.
            InputError: The images and texts do not fit the task.
            DataError: An image cannot be read.
        """
        # Tasks lie above exports, and the face of the package above both.
        from xfm_fast import load

        return load(self).predict(images, texts)

    @cached_property
    def processor(self) -> XFMProcessor:
        """The preprocessor of image files and texts of the exported model.

        Raises:
            DataError: The tokenizer of the export is damaged or belongs to another model.
        """
        return XFMProcessor(self.config, find_tokenizer(self.folder, self.config))

    @property
    def ready(self) -> bool:
        """True when all graphs are loaded and warm."""
        return self._ready

    @property
    def description(self) -> str:
        """Library, version and device."""
        return self.runtime.description

    def warm_up(self) -> None:
        """Load every graph and run it once in every slot; `ready` is True afterwards.

        Raises:
            ExportError: A graph does not load or run.
        """
        for record in self.manifest.graphs:
            if record.name in self._graphs:
                continue
            self._graphs[record.name] = self.runtime.load(record, self.folder / record.file)
            try:
                for slot in self._slots[record.name]:
                    self.call(record.name, self.example_inputs(record.name, slot))
                self.synchronize()
            except (LookupError, RuntimeError, TypeError, ValueError) as error:
                if isinstance(error, XFMError):
                    raise
                raise ExportError(
                    f"graph {record.name!r} does not run as {MANIFEST_FILE} describes it ({first_line(error)}); export "
                    "it again"
                ) from error
        self._ready = True

    def slots(self, graph: GraphName) -> Sequence[Slot]:
        """The shapes that a graph accepts."""
        self.require(graph)
        return self._slots[graph]

    def example_inputs(
        self, graph: GraphName, slot: Slot, sizes: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Inputs of zeros, ids and full masks, at given or tuned sizes."""
        sizes = slot.example() if sizes is None else sizes
        made = {}
        for tensor in self.manifest.graph(graph).inputs:
            token = self.config.eos_token_id
            filling = token if tensor.name in _IDS else int(tensor.name.endswith("_mask"))
            made[tensor.name] = torch.full(
                tensor.shape(sizes), filling, dtype=TORCH_DTYPES[tensor.dtype], device=self.device
            )
        return made

    def synchronize(self) -> None:
        """Wait for pending GPU work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph: all inputs by name, all outputs by name.

        Inputs are padded to the closest slot, and the outputs are cut to the sizes of the inputs.

        Raises:
            InputError: Inputs that do not fit the graph, or sizes beyond every profile.
            ExportError: The graph is not in this export.
            UnavailableError: The session is not ready.
        """
        name = self.require(graph)
        for given, value in inputs.items():
            if given in _IDS:
                checks.check_ids(value, self.config, given)
            elif given == "attention_mask":
                checks.check_padding(value)
        with torch.inference_mode():
            return self.call(name, inputs)

    def call(self, name: GraphName, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        record = self.manifest.graph(name)
        sizes = request_sizes(record, inputs)
        slot, padded = choose_slot(name, self._slots[name], sizes)
        prepared = {}
        for tensor in record.inputs:
            value = inputs[tensor.name].detach().to(self.device, TORCH_DTYPES[tensor.dtype])
            filling = self.config.pad_token_id if tensor.name in _PADDED else 0
            prepared[tensor.name] = pad_tensor(value, tensor.axes, padded, filling).contiguous()
        outputs = self._graphs[name].run(prepared, slot, padded)
        if padded == sizes:
            return outputs
        return {
            output.name: trim_tensor(outputs[output.name], output.axes, sizes)
            for output in record.outputs
        }

    def require(self, name: str) -> GraphName:
        if name not in self.manifest.graph_names:
            raise ExportError(
                f"graph {name!r} is not in {self.folder} (it has: {', '.join(self.manifest.graph_names)}); export it "
                f"with --graphs"
            )
        if not self._ready:
            raise UnavailableError(
                "this session is not ready; call warm_up() first, or open it with Session.load"
            )
        return name

    def pieces(
        self, graph: GraphName, axis: str, count: int, *limits: int, **sizes: int
    ) -> Sequence[slice]:
        """0 to `count` in slices within the limits and the largest size of an axis, in the slots that take `sizes`."""
        most = largest([slot for slot in self.slots(graph) if slot.padded(sizes) is not None], axis)
        size = max(1, min((*limits, count) if most is None else (*limits, count, most)))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def in_batches(
        self, graph: GraphName, inputs: Mapping[str, Tensor], *limits: int
    ) -> dict[str, Tensor]:
        """Run a graph on any number of rows, in passes that it accepts."""
        rows = self.pieces(graph, "batch", len(next(iter(inputs.values()))), *limits)
        passes = [
            self.call(graph, {name: value[part] for name, value in inputs.items()}) for part in rows
        ]
        if not passes:
            return self.zeros(graph, request_sizes(self.manifest.graph(graph), inputs))
        if len(passes) == 1:
            return passes[0]
        return {name: torch.cat([each[name] for each in passes]) for name in passes[0]}

    def zeros(self, name: GraphName, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        outputs = self.manifest.graph(name).outputs
        made = empty_tensors(outputs, sizes, self.device)
        return {
            each.name: trim_tensor(made[each.name], each.axes, sizes).zero_() for each in outputs
        }

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads in the export: of `contrastive`, `matching`, `boxes`, `classification`."""
        outputs = {output.name for graph in self.manifest.graphs for output in graph.outputs}
        marks = {
            "contrastive": {"image_feature", "text_feature"},
            "matching": {"match_logits"},
            "boxes": {"boxes"},
            "classification": {"class_logits"},
        }
        return tuple(head for head, names in marks.items() if names & outputs)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """`XFM.encode_image` without its options: `[B, 3, R, R]` → `[B, 1 + N, vision_width]`.

        Accepts any number of images; batches beyond a profile run in several passes.
        """
        self.require("vision")
        checks.check_pixels(pixels, self.config)
        with torch.inference_mode():
            return self._attach(self.in_batches("vision", {"pixels": pixels}), "image_embeds")

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`XFM.encode_text` without its options: `[B, L]` → `[B, L, text_width]`, zeros at padded positions.

        Raises:
            InputError: A text is longer than the export accepts.
        """
        self.require("text")
        mask = checks.check_tokens(input_ids, attention_mask, self.config)
        with torch.inference_mode():
            return self._attach(self.text_outputs(input_ids, mask), "text_embeds")

    def text_outputs(self, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """All outputs of the text graph for `[B, L]` ids and mask, `text_embeds` unpacked with zeros at padding."""
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        if not self.manifest.packed:
            return self._padded_texts(input_ids, mask)
        texts, width = input_ids.shape
        padding, real = self.config.pad_token_id, input_ids.ne(self.config.pad_token_id)
        values = {"packed_ids": input_ids, "positions": real.cumsum(1) * real + padding}
        lengths, tokens = mask.sum(1).tolist(), mask.flatten().nonzero().flatten()
        given = {
            name: (value.flatten().index_select(0, tokens), padding)
            for name, value in values.items()
        }
        passes = plan_passes(
            "text", None, lengths, self.slots("text"), self.limits, packed_width=self._packed_width
        )
        outputs = self._run_passes("text", passes, lengths, given, rows=(texts * width, tokens))
        embeds = outputs.pop("packed_embeds")
        return {"text_embeds": embeds.view(texts, width, embeds.shape[1]), **outputs}

    def _padded_texts(self, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`text_outputs` of a padded graph: rows are copied whole, which costs less than token by token."""
        texts, width = input_ids.shape
        # Up to the last real token; a mask may have gaps before it.
        places = torch.arange(1, width + 1, device=self.device)
        lengths = (mask * places).amax(1).tolist() if texts else []
        outputs = {}
        for output in self.manifest.graph("text").outputs:
            shape = (texts, width) if "length" in output.axes else (texts,)
            dtype = TORCH_DTYPES[output.dtype]
            outputs[output.name] = torch.zeros(
                *shape, int(output.dims[-1]), dtype=dtype, device=self.device
            )
        for work in plan_passes("text", None, lengths, self.slots("text"), self.limits):
            rows = torch.tensor([text for (text,) in work.rows[0]], device=self.device)
            kept, sizes = min(work.length, width), {"batch": len(rows), "length": work.length}
            ids, real = (value[:, :kept].index_select(0, rows) for value in (input_ids, mask))
            given = {
                "input_ids": pad_tensor(ids, ("batch", "length"), sizes, self.config.pad_token_id),
                "attention_mask": pad_tensor(real, ("batch", "length"), sizes),
            }
            made = self.call("text", given)
            outputs["text_embeds"][rows, :kept] = (
                made.pop("text_embeds")[:, :kept] * real[..., None]
            )
            for name, value in made.items():
                outputs[name][rows] = value
        return outputs

    @property
    def _packed_width(self) -> int | None:
        return self.config.text_width if self.manifest.packed else None

    def _run_passes(
        self,
        graph: GraphName,
        passes: Sequence[Pass],
        lengths: Sequence[int],
        tokens: Mapping[str, tuple[Tensor, int | None]],
        memory: SessionMemory | None = None,
        rows: tuple[int, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Outputs of `text` or `fusion` by caption `[P, ...]` or by token `[sum(lengths), ...]`.

        `tokens` are inputs by name, `[sum(lengths), ...]`, with what to fill padding with. `rows` are the number of
        rows of an output by token and the row of each token, if they are others; rows without a token are zero.
        """
        packed, outputs, by_token = self.manifest.packed, {}, set()
        for output in self.manifest.graph(graph).outputs:
            count = len(lengths)
            if "length" in output.axes:
                by_token.add(output.name)
                count = sum(lengths) if rows is None else rows[0]
            dtype = TORCH_DTYPES[output.dtype]
            outputs[output.name] = torch.zeros(
                count, int(output.dims[-1]), dtype=dtype, device=self.device
            )
        empty = torch.empty(0, dtype=torch.long)
        for work in passes:
            layout = Layout.of(work.rows, lengths, work.length)
            given = layout.inputs(packed) | {
                name: layout.spread(*value) for name, value in tokens.items()
            }
            if memory is None:
                given = {name: value[0] for name, value in given.items()}
            else:
                given |= memory.rows(work.images).layers
            of_tokens = (layout.source, layout.place) if by_token else (empty, empty)
            source, place, texts, found = (
                index.to(self.device) for index in (*of_tokens, layout.texts, layout.found)
            )
            into = source if rows is None else rows[1].index_select(0, source)
            for name, value in self.call(graph, given).items():
                to, at = (into, place) if name in by_token else (texts, found)
                outputs[name].index_copy_(0, to, value.flatten(0, -2).index_select(0, at))
        return outputs

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """Contrastive features `[B, embed_dim]`; `image_embeds` is the very tensor that `encode_image` returned.

        The vision graph computes both together, so other tensors have no features.
        """
        return self._attached(image_embeds, "image_feature", "encode_image", "contrastive")

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """Contrastive features `[B, embed_dim]`; `text_embeds` is the very tensor that `encode_text` returned."""
        return self._attached(text_embeds, "text_feature", "encode_text", "contrastive")

    def image_memory(self, image_embeds: Tensor) -> SessionMemory:
        """`XFM.image_memory` without its mask: `[B, 1 + N, vision_width]` → memory of B images."""
        self.require("image_memory")
        expected = (self.config.num_image_tokens, self.config.vision_width)
        if image_embeds.dim() != 3 or image_embeds.shape[1:] != expected:
            raise InputError(
                f"image embeddings are {[*image_embeds.shape]}; this export takes [B, {expected[0]}, {expected[1]}]"
            )
        with torch.inference_mode():
            return SessionMemory(self.in_batches("image_memory", {"image_embeds": image_embeds}))

    def fuse(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        memory: SessionMemory,
        image_index: Tensor | None = None,
        *,
        first_token_only: bool = False,
    ) -> Tensor:
        """`XFM.fuse` of P texts with B images; pass the result to `match_logits` and `predict_boxes` as it is.

        Args:
            text_embeds: `[P, L, text_width]`.
            attention_mask: `[P, L]`.
            memory: Result of `image_memory`.
            image_index: `[P]` image of each text; by default text b belongs to image b.
            first_token_only: Return token 0 only. All tokens need an export with `all_tokens`.

        Returns:
            `[P, 1, text_width]` with `first_token_only`, else `[P, L, text_width]` with zeros at padded positions.
        """
        self.require("fusion")
        if not first_token_only and not self.manifest.all_tokens:
            raise UnavailableError(
                "this export returns token 0 of fused texts alone; call fuse(..., first_token_only=True), or export "
                "with OnnxRequest(all_tokens=True)"
            )
        checks.check_embeddings(text_embeds, self.config.text_width, "text embeddings")
        mask = checks.check_attention_mask(attention_mask, [*text_embeds.shape[:2]]).to(self.device)
        texts = text_embeds.shape[0]
        if image_index is None:
            if texts != memory.images:
                raise InputError(
                    f"{texts} texts and {memory.images} images do not pair up; pass image_index"
                )
            image_index = torch.arange(texts)
        image_of = checks.check_image_index(image_index, memory.images, texts, "texts").tolist()
        with torch.inference_mode():
            packing = Packing.from_mask(mask)
            tokens = packing.pack(text_embeds.to(self.device, self.dtype))
            outputs = self.fuse_packed(tokens, mask.sum(1), memory, image_of)
            whole = outputs.pop("fused_tokens", None)
            if first_token_only or whole is None:
                outputs["fused"] = outputs["fused"][:, None]
            else:
                outputs["fused"] = packing.unpad(whole)
        return self._attach(outputs, "fused")

    def match_logits(self, fused: Tensor) -> Tensor:
        """`[P, 2]`; column 1 scores "text describes image". `fused` is the tensor that `fuse` returned."""
        return self._attached(fused, "match_logits", "fuse", "matching")

    def predict_boxes(self, fused: Tensor) -> Tensor:
        """`[P, 4]` boxes (cx, cy, w, h) relative to the image. `fused` is the tensor that `fuse` returned."""
        return self._attached(fused, "boxes", "fuse", "boxes")

    def class_logits(self, tensor: Tensor, origin: str) -> Tensor:
        """`[B, classes]`, computed with `tensor`, the result of the method `origin`."""
        return self._attached(tensor, "class_logits", origin, "classification")

    def fingerprint(self) -> str:
        """A digest of the files and the runtime, which together decide the results."""
        sums = sorted(record.sha256 for record in self.manifest.files)
        return hashlib.sha256(" ".join([self.description, *sums]).encode()).hexdigest()

    def pair_scorer(self) -> SessionScorer:
        """The pair scorer of re-ranking (`xfm_fast.tasks.reranking.PairScorer`)."""
        self.require("image_memory")
        self.require("fusion")
        if "matching" not in self.heads:
            raise UnavailableError(
                "this export has no match logits: its model was built without the 'matching' head"
            )
        return SessionScorer(self)

    def passes(self, lengths: Sequence[int], image_of: Sequence[int]) -> Sequence[Pass]:
        """The passes of `fuse_packed`."""
        slots = self.slots("fusion")
        return plan_passes(
            "fusion", image_of, lengths, slots, self.limits, packed_width=self._packed_width
        )

    def fuse_packed(
        self, tokens: Tensor, lengths: Tensor, memory: SessionMemory, image_of: Sequence[int]
    ) -> dict[str, Tensor]:
        """Fuse concatenated texts, without padding.

        Args:
            tokens: `[sum(lengths), text_width]`.
            lengths: `[P]` tokens of each text, at least one.
            memory: Result of `image_memory`.
            image_of: Image of each text.

        Returns:
            `fused` `[P, text_width]`, and depending on the export `match_logits` `[P, 2]`, `boxes` `[P, 4]` and
            `fused_tokens` `[sum(lengths), text_width]`.
        """
        sizes = lengths.tolist()
        name = "packed_embeds" if self.manifest.packed else "text_embeds"
        outputs = self._run_passes(
            "fusion", self.passes(sizes, image_of), sizes, {name: (tokens, None)}, memory
        )
        if self.manifest.all_tokens and not self.manifest.packed:
            whole = outputs["fused"]
            starts = offsets(lengths.to(self.device))[:-1].long()
            return outputs | {"fused": whole.index_select(0, starts), "fused_tokens": whole}
        return outputs

    def _attach(self, outputs: dict[str, Tensor], name: str) -> Tensor:
        result = outputs.pop(name)
        with self._lock:
            self._carried[result] = outputs
        return result

    def _attached(self, tensor: Tensor, name: str, origin: str, head: str) -> Tensor:
        if head not in self.heads:
            raise UnavailableError(
                f"this export has no {name}: its model was built without the {head!r} head; export a model with it"
            )
        with self._lock:
            outputs = self._carried.get(tensor)
        if outputs is None or name not in outputs:
            raise InputError(
                f"{name} is computed by {origin}, together with its result; pass the very tensor that {origin} of this "
                "session returned, not a part or copy of it"
            )
        return outputs[name]


def _class_of(folder: Path) -> type[Session]:
    """The session class of the task of an export, or `Session`."""
    from .tasks import task_session

    try:
        return task_session(read_json(folder / TASK_FILE).get("task").get("kind")) or Session
    # Graphs run without the file; `predict` reports a damaged one.
    except (OSError, ValueError, AttributeError, TypeError):
        return Session


class SessionScorer:
    """A `PairScorer` over a session with the graphs `image_memory` and `fusion`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config

    def prepare(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """No work: the fusion graph starts with the text embeddings."""
        return tokens

    def memory(self, image_embeds: Tensor) -> SessionMemory:
        """The memory of images `[B, 1 + N, width]`."""
        return self.session.image_memory(image_embeds)

    def scores(
        self, tokens: Tensor, sequences: Sequences, memory: SessionMemory, groups: ImageGroups
    ) -> Tensor:
        """Match score of every caption with its image: `[P]`."""
        lengths, texts = sequences.cu_seqlens.diff(), groups.cu_texts.diff().long()
        image_of = torch.repeat_interleave(
            torch.arange(len(texts), device=texts.device), texts
        ).tolist()
        with torch.inference_mode():
            outputs = self.session.fuse_packed(
                tokens.to(self.session.device, self.session.dtype), lengths, memory, image_of
            )
        return outputs["match_logits"][:, 1]

    def fingerprint(self) -> str:
        """A hash of the weights and the runtime, which decides the last digits."""
        manifest = self.session.manifest
        files = {
            name for graph in ("image_memory", "fusion") for name in manifest.graph(graph).files
        }
        sums = sorted(record.sha256 for record in manifest.files if record.name in files)
        facts = [self.session.description, manifest.weights_sha256, *sums]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]


class SessionRanks:
    """A `RankModel` over a session with `vision`, `text`, `image_memory` and `fusion`; the session batches inputs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self.dtype_name: str = session.manifest.dtype

    @property
    def token_budget(self) -> int:
        """Caption tokens of a pass of the session."""
        return self.session.limits.budget

    def captions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.session.encode_text(input_ids, attention_mask)
        return Packing.from_mask(attention_mask.to(embedded.device)).pack(embedded)

    def images(self, pixels: Tensor) -> Tensor:
        return self.session.encode_image(pixels)

    def memories(self, embeds: Tensor) -> list[SessionMemory]:
        memory = self.session.image_memory(embeds)
        # Copies, so that a cached image does not hold the memory of others.
        return [memory.select(torch.tensor([row])) for row in range(memory.images)]

    def logits(
        self,
        tokens: Tensor,
        lengths: Tensor,
        memories: Sequence[SessionMemory],
        counts: Sequence[int],
    ) -> Tensor:
        memory = SessionMemory.joined(memories)
        image_of = [image for image, count in enumerate(counts) for _ in range(count)]
        return self.session.fuse_packed(tokens, lengths, memory, image_of)["match_logits"]

    def caption_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.session.project_text(self.session.encode_text(input_ids, attention_mask))

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.session.project_image(self.session.encode_image(pixels))
