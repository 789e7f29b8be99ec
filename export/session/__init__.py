"""The interface of the model over exported graphs: `Retriever(session)` works as with an `XFM`.

Sessions sort captions by length and pad them in small groups, split batches to the sizes of a profile, and divide pairs
of captions and images into passes of the fusion graph.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xfm_fast.checkpoint.files import TASK_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.io import read_json
from xfm_fast.models import inputs as checks
from xfm_fast.models.processor import XFMProcessor, find_tokenizer
from xfm_fast.packing import Packing, offsets

from ..graphs import DTYPES, GraphName, SessionMemory
from ..slots import TORCH_DTYPES, Layout, PassLimits, pad_tensor, plan_passes
from .graphs import TOKENS, GraphSession

if TYPE_CHECKING:
    from .tasks import SessionScorer

# A pass reads all weights of an encoder and cuts the memory into layers, which takes a CPU as long as some dozens of
# tokens. A GPU profits from few shapes.
_LIMITS = {
    "cpu": PassLimits(budget=2048, pass_tokens=32),
    "cuda": PassLimits(budget=32768, pass_tokens=512, step=8),
}


class Session(GraphSession):
    """Runs the graphs of an X-FM with the methods of the model. Use `Session.load`.

    Attributes:
        config: Sizes of the model.
        dtype: Dtype of embeddings and results.
        limits: Sizes of the passes of captions.
        task: The task of `predict`, set by its first call.
    """

    def __init__(self, folder: str | Path, *args: Any, **options: Any) -> None:
        super().__init__(folder, *args, **options)
        self.config: XFMConfig = self.manifest.xfm_config
        self.dtype: torch.dtype = DTYPES[self.manifest.dtype]
        self.padding_id, self.example_id = self.config.pad_token_id, self.config.eos_token_id
        self.task: Any = None
        self.limits = _LIMITS["cpu" if self.device.type == "cpu" else "cuda"]
        # For the lifetime of an embedding, the other outputs of the graph that computed it.
        self._outputs_of: Any = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    @classmethod
    def class_of(cls, folder: Path) -> type[GraphSession]:
        """See `GraphSession.class_of`; the session of a fine-tuned model has the methods of its task."""
        return _class_of(folder) if cls is Session else cls

    def predict(
        self, images: Sequence[str | Path] = (), texts: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Answer for image files and texts, as `xfm_fast.load(folder).predict` does.

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
        # Predictors are above exports in the order of imports.
        from xfm_fast import load

        return load(self).predict(images, texts)

    @cached_property
    def processor(self) -> XFMProcessor:
        """The preprocessor of image files and texts of the exported model.

        Raises:
            DataError: The tokenizer of the export is damaged or belongs to another model.
        """
        return XFMProcessor(self.config, find_tokenizer(self.folder, self.config))

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph: all inputs by name, all outputs by name.

        Inputs are padded to the closest slot, and the outputs are cut to the sizes of the inputs.

        Raises:
            InputError: The inputs do not fit the graph, or exceed every profile.
            ExportError: The graph is not in this export.
            UnavailableError: The session is not ready.
        """
        graph = self.require(graph)
        for name, value in inputs.items():
            if name in TOKENS:
                checks.check_ids(value, self.config, name)
            elif name == "attention_mask":
                checks.check_padding(value)
        with torch.inference_mode():
            return self.call(graph, inputs)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads of the export: of `contrastive`, `matching`, `boxes`, `classification`."""
        outputs = {output.name for graph in self.manifest.graphs for output in graph.outputs}
        heads = {
            "contrastive": {"image_feature", "text_feature"},
            "matching": {"match_logits"},
            "boxes": {"boxes"},
            "classification": {"class_logits"},
        }
        return tuple(head for head, names in heads.items() if names & outputs)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode images as `XFM.encode_image` does: `[B, 3, R, R]` → `[B, 1 + N, vision_width]`.

        Accepts any number of images; batches beyond a profile run in several passes.
        """
        self.require("vision")
        checks.check_pixels(pixels, self.config)
        with torch.inference_mode():
            return self._attach(self.in_batches("vision", {"pixels": pixels}), "image_embeds")

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode texts as `XFM.encode_text` does: `[B, L]` → `[B, L, text_width]`, zeros at padded positions.

        Raises:
            InputError: A text is longer than the export accepts.
        """
        self.require("text")
        mask = checks.check_tokens(input_ids, attention_mask, self.config)
        with torch.inference_mode():
            return self._attach(self.text_outputs(input_ids, mask), "text_embeds")

    def text_outputs(self, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return all outputs of the text graph for `[B, L]` ids and mask; `text_embeds` has zeros at padding."""
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        if not self.manifest.packed:
            return self._padded_texts(input_ids, mask)
        padding, real = self.config.pad_token_id, input_ids.ne(self.config.pad_token_id)
        packing = Packing.from_mask(mask)
        tokens = {
            "packed_ids": (packing.pack(input_ids), padding),
            "positions": (packing.pack(real.cumsum(1) * real + padding), padding),
        }
        outputs = self._run_passes("text", None, mask.sum(1).tolist(), tokens)
        return {"text_embeds": packing.unpad(outputs.pop("packed_embeds")), **outputs}

    def _padded_texts(self, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Run a padded text graph: rows are copied whole, which costs less than token by token."""
        texts, width = input_ids.shape
        # Up to the last real token; a mask may have gaps before it.
        positions = torch.arange(1, width + 1, device=self.device)
        lengths = (mask * positions).amax(1).tolist() if texts else []
        outputs = self._zeros("text", (texts,), (texts, width))
        for work in plan_passes("text", None, lengths, self.slots("text"), self.limits):
            rows = torch.tensor([text for (text,) in work.rows[0]], device=self.device)
            length, sizes = min(work.length, width), {"batch": len(rows), "length": work.length}
            ids, real = (value[:, :length].index_select(0, rows) for value in (input_ids, mask))
            inputs = {
                "input_ids": pad_tensor(ids, ("batch", "length"), sizes, self.config.pad_token_id),
                "attention_mask": pad_tensor(real, ("batch", "length"), sizes),
            }
            for name, value in self.call("text", inputs).items():
                if name == "text_embeds":
                    outputs[name][rows, :length] = value[:, :length] * real[..., None]
                else:
                    outputs[name][rows] = value
        return outputs

    def _zeros(
        self, graph: GraphName, captions: tuple[int, ...], tokens: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Allocate zeros for the outputs of `text` or `fusion`, with a row per caption or per token."""
        return {
            tensor.name: torch.zeros(
                *(tokens if "length" in tensor.axes else captions),
                int(tensor.dims[-1]),
                dtype=TORCH_DTYPES[tensor.dtype],
                device=self.device,
            )
            for tensor in self.manifest.graph(graph).outputs
        }

    def _run_passes(
        self,
        graph: GraphName,
        image_of: Sequence[int] | None,
        lengths: Sequence[int],
        tokens: Mapping[str, tuple[Tensor, int | None]],
        memory: SessionMemory | None = None,
    ) -> dict[str, Tensor]:
        """Return outputs of `text` or `fusion` by caption `[P, ...]` or by token `[sum(lengths), ...]`.

        `tokens` are inputs by name, `[sum(lengths), ...]`, with the value of padding.
        """
        packed, width = self.manifest.packed, self.config.text_width
        passes = plan_passes(
            graph,
            image_of,
            lengths,
            self.slots(graph),
            self.limits,
            packed_width=width if packed else None,
        )
        outputs = self._zeros(graph, (len(lengths),), (sum(lengths),))
        records = self.manifest.graph(graph).outputs
        by_token = {tensor.name for tensor in records if "length" in tensor.axes}
        for work in passes:
            layout = Layout.of(work.rows, lengths, work.length)
            inputs = layout.inputs(packed)
            for name, (values, padding) in tokens.items():
                inputs[name] = layout.spread(values, padding)
            if memory is None:
                inputs = {name: value[0] for name, value in inputs.items()}
            else:
                inputs |= memory.rows(work.images).layers
            caption_rows = layout.texts.to(self.device), layout.results.to(self.device)
            token_rows = caption_rows
            if by_token:
                token_rows = layout.source.to(self.device), layout.target.to(self.device)
            for name, value in self.call(graph, inputs).items():
                to, at = token_rows if name in by_token else caption_rows
                outputs[name].index_copy_(0, to, value.flatten(0, -2).index_select(0, at))
        return outputs

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """Return contrastive features `[B, embed_dim]`; `image_embeds` is the very tensor that `encode_image` returned.

        The vision graph computes both together, so other tensors have no features.
        """
        return self._attached(image_embeds, "image_feature", "encode_image", "contrastive")

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """Return contrastive features `[B, embed_dim]`; `text_embeds` is the very tensor of `encode_text`."""
        return self._attached(text_embeds, "text_feature", "encode_text", "contrastive")

    def image_memory(self, image_embeds: Tensor) -> SessionMemory:
        """Project images as `XFM.image_memory` does, without a mask: `[B, 1 + N, vision_width]` → memory."""
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
        """Fuse P texts with B images as `XFM.fuse` does; `match_logits` and `predict_boxes` take the result as it is.

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
            fused_tokens = outputs.pop("fused_tokens", None)
            if first_token_only or fused_tokens is None:
                outputs["fused"] = outputs["fused"][:, None]
            else:
                outputs["fused"] = packing.unpad(fused_tokens)
        return self._attach(outputs, "fused")

    def match_logits(self, fused: Tensor) -> Tensor:
        """Return `[P, 2]`; column 1 scores "text describes image". `fused` is the very tensor of `fuse`."""
        return self._attached(fused, "match_logits", "fuse", "matching")

    def predict_boxes(self, fused: Tensor) -> Tensor:
        """Return `[P, 4]` boxes (cx, cy, w, h) relative to the image. `fused` is the very tensor of `fuse`."""
        return self._attached(fused, "boxes", "fuse", "boxes")

    def class_logits(self, tensor: Tensor, origin: str) -> Tensor:
        """Return `[B, classes]`, computed together with `tensor`, the result of the method `origin`."""
        return self._attached(tensor, "class_logits", origin, "classification")

    def pair_scorer(self) -> SessionScorer:
        """Return the pair scorer of re-ranking (`xfm_fast.tasks.reranking.PairScorer`)."""
        from .tasks import SessionScorer

        self.require("image_memory")
        self.require("fusion")
        if "matching" not in self.heads:
            raise UnavailableError(
                "this export has no match logits: its model was built without the 'matching' head"
            )
        return SessionScorer(self)

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
        name = "packed_embeds" if self.manifest.packed else "text_embeds"
        outputs = self._run_passes(
            "fusion", image_of, lengths.tolist(), {name: (tokens, None)}, memory
        )
        if self.manifest.all_tokens and not self.manifest.packed:
            outputs["fused_tokens"] = outputs["fused"]
            starts = offsets(lengths.to(self.device))[:-1].long()
            outputs["fused"] = outputs["fused_tokens"].index_select(0, starts)
        return outputs

    def _attach(self, outputs: dict[str, Tensor], name: str) -> Tensor:
        """Return one of the outputs, and keep the others for `_attached`."""
        result = outputs.pop(name)
        with self._lock:
            self._outputs_of[result] = outputs
        return result

    def _attached(self, tensor: Tensor, name: str, origin: str, head: str) -> Tensor:
        if head not in self.heads:
            raise UnavailableError(
                f"this export has no {name}: its model was built without the {head!r} head; export a model with it"
            )
        with self._lock:
            outputs = self._outputs_of.get(tensor)
        if outputs is None or name not in outputs:
            raise InputError(
                f"{name} is computed by {origin}, together with its result; pass the very tensor that {origin} of this "
                "session returned, not a slice or copy of it"
            )
        return outputs[name]


def _class_of(folder: Path) -> type[Session]:
    """Return the session class of the task of an export, or `Session`."""
    from .tasks import task_session

    try:
        return task_session(read_json(folder / TASK_FILE).get("task").get("kind")) or Session
    # Graphs run without the file; `predict` reports a damaged one.
    except (OSError, ValueError, AttributeError, TypeError):
        return Session
