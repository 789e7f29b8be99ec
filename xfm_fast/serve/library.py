"""A model of sentence-transformers behind the service: an embedder, a sparse encoder or a cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import compress
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xfm_fast.data.images import decode_image
from xfm_fast.data.shapes import captions, render, scene
from xfm_fast.encoders import Encoder, LibraryEncoder, Use, open_encoder
from xfm_fast.errors import DataError, InputError, XFMError
from xfm_fast.loading import Source
from xfm_fast.serve.model import (
    Ability,
    Content,
    Reading,
    ServedModel,
    TooLongError,
    Work,
    black_square,
)
from xfm_fast.tasks.ranking import Picture

_ABILITIES: dict[Use, tuple[Ability, ...]] = {
    "embedding": ("embed", "compare"),
    "sparse": ("embed_sparse",),
    "ranking": ("rank", "classify"),
}
# Texts tokenised between two checks of the request; their characters bound the memory of it.
_SLICE_CHARACTERS = 1 << 16
_IMAGES_TOGETHER = 16
_UNLIMITED = 1 << 30
# Captions on which a model in 8 bits is compared with fp32, and the nearest ones that count.
_CAPTIONS, _BEST = 128, 10

Side = Literal["left", "right"]
Text = str | tuple[str, str]
"""A text, or a pair of texts for a cross-encoder."""


class Group(NamedTuple):
    """Properties that the inputs of a forward pass share."""

    form: Literal["ids", "text", "pair", "image"]
    role: Any = None
    prompt: str | None = None
    prompt_length: int | None = None


class Row(NamedTuple):
    """An input of the model: token ids and their types, a text or a pair of texts, or an image."""

    group: Group
    value: Any
    types: Any = None
    length: int = 0


class FastTokenizer:
    """The model's tokenizer without the library around it, whose settings never change: safe in every thread."""

    def __init__(self, encoder: LibraryEncoder, max_tokens: int) -> None:
        tokenizer, self._whole = encoder.model.tokenizer, encoder.whole_tokenizer
        self._by_side: dict[Side, Any] = {}
        for side in get_args(Side):
            self._by_side[side] = deepcopy(self._whole)
            if max_tokens < _UNLIMITED:
                self._by_side[side].enable_truncation(max_tokens, direction=side)
        self._pad, self._pad_type = tokenizer.pad_token_id or 0, tokenizer.pad_token_type_id
        self._pads_left = tokenizer.padding_side == "left"

    def encode(self, texts: Sequence[Text], side: Side) -> list[Any]:
        """Encode texts or pairs of texts, truncated."""
        return self._by_side[side].encode_batch_fast(texts)

    def describe(self, texts: Sequence[str], special: bool) -> list[list[dict[str, Any]]]:
        """Describe the tokens of whole texts in TEI's form; `special` adds special ones."""
        descriptions = []
        for encoding in self._whole.encode_batch([*texts], add_special_tokens=special):
            masks, spans = encoding.special_tokens_mask, encoding.offsets
            tokens = []
            for token, text, mask, span in zip(
                encoding.ids, encoding.tokens, masks, spans, strict=True
            ):
                start, stop = (None, None) if mask else span
                tokens.append(
                    {"id": token, "text": text, "special": bool(mask), "start": start, "stop": stop}
                )
            descriptions.append(tokens)
        return descriptions

    def inputs(self, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
        """Make the model's inputs from rows of token ids, with padding."""
        longest = max(row.length for row in rows)
        shape = (len(rows), longest)
        ids = np.full(shape, self._pad, np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.full(shape, self._pad_type, np.int64) if "token_type_ids" in names else None
        for index, row in enumerate(rows):
            span = slice(longest - row.length, None) if self._pads_left else slice(row.length)
            ids[index, span] = row.value
            mask[index, span] = 1
            if types is not None:
                types[index, span] = row.types
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        inputs: dict[str, Any] = {
            name: torch.from_numpy(arrays[name]) for name in names if arrays[name] is not None
        }
        inputs["modality"] = "text"
        return inputs


class LibraryModel(ServedModel):
    """A `LibraryEncoder` behind the service.

    Texts are tokenised by `FastTokenizer` where it makes what the library makes of samples; else the
    library reads them when their batch begins, which takes longer.
    """

    encoder: LibraryEncoder
    random = False

    def __init__(self, encoder: LibraryEncoder, name: str | None = None, quality: str = "") -> None:
        self.encoder, self.name = encoder, name or encoder.name
        self.source = f"{encoder.origin}{quality and ', '}{quality}"
        self.abilities, self.modalities = _ABILITIES[encoder.use], encoder.modalities
        if encoder.use == "ranking" and encoder.width > 1:
            self.abilities = ("classify",)
        self.device, self.width = encoder.device, encoder.width
        self.dtype = encoder.source.dtype or "fp32"
        self.max_tokens = min(encoder.max_tokens or _UNLIMITED, _UNLIMITED)
        self.prompts = encoder.prompts
        if encoder.use == "ranking":
            labels = getattr(encoder.model.config, "id2label", None) or {}
            self.labels = [
                str(labels.get(index, f"LABEL_{index}")) for index in range(encoder.width)
            ]
        # Pooling may leave out the prompt, whose length all texts of a forward pass then share.
        pools_prompts = all(getattr(module, "include_prompt", True) for module in encoder.model)
        self._prompt_lengths = {
            prompt: encoder.prepare(["a"], prompt=prompt).get("prompt_length")
            for prompt in ([] if pools_prompts else self.prompts.values())
        }
        self._names: list[str] = []
        self.tokenizer = self._fast_tokenizer()
        self.quick = self.tokenizer is not None

    def _fast_tokenizer(self) -> FastTokenizer | None:
        """Return the fast tokenizer if its inputs are the library's."""
        encoder = self.encoder
        if (
            "text" not in self.modalities
            or encoder.whole_tokenizer is None
            or _reads_by_role(encoder)
        ):
            return None
        fast = FastTokenizer(encoder, self.max_tokens)
        long = "many words, " * min(self.max_tokens, 4096)
        samples: list[Any] = [
            "A red circle",
            "",
            long,
            "\u00dcber\u00e9t\u00e9 \u6f22\u5b57 \U0001f600",
        ]
        if encoder.use == "ranking":
            samples = [*zip(samples, samples[1:], strict=False), ("a", long), (long, "b")]
        for batch in (samples, samples[:1]):
            expected = encoder.prepare(batch)
            self._names = [name for name, value in expected.items() if isinstance(value, Tensor)]
            rows = [_ids_row(Group("ids"), encoding) for encoding in fast.encode(batch, "right")]
            inputs = fast.inputs(rows, self._names)
            same = inputs.keys() == expected.keys() and all(
                torch.equal(inputs[name], expected[name]) for name in self._names
            )
            if not same:
                return None
        return fast

    def read(
        self,
        contents: Sequence[Content],
        names: Sequence[str],
        reading: Reading,
        check: Callable[[], object],
    ) -> Work:
        encoder = self.encoder
        for content, name in zip(contents, names, strict=True):
            modality = "image" if isinstance(content, Picture) else "text"
            if modality not in self.modalities:
                readable = " and ".join(self.modalities)
                raise InputError(f"{name} is {modality}, and {self.name} reads {readable}")
        inputs, sources, scoring = [*contents], [*range(len(contents))], "similarity"
        if encoder.use == "ranking":
            scoring = reading.scoring or "probability"
            inputs = [
                contents[first] if first == second else (contents[first], contents[second])
                for first, second in reading.pairs
            ]
            sources = [second for _, second in reading.pairs]
        names = [names[source] for source in sources]
        rows = [Row(Group("image"), content, None, 1) for content in inputs]
        truncated = list[int]()
        for indices in _slices(inputs, reading.following is not None):
            check()
            truncated += self._read_texts(rows, indices, names, reading)
        tokens = sum(row.length for row in rows)
        truncated = tuple(sources[index] for index in truncated)
        return Work(tuple(rows), replace(reading, scoring=scoring), tokens, truncated)

    def _read_texts(
        self, rows: list[Row], indices: Sequence[int], names: Sequence[str], reading: Reading
    ) -> Iterator[int]:
        """Replace the rows of texts of one role; returns the indices of those that are truncated."""
        encoder = self.encoder
        role = reading.following or reading.role if indices[0] else reading.role
        role = None if encoder.use == "ranking" else role
        prompt = encoder.prompt(role, reading.prompt)
        texts = [_prompted(rows[index].value, prompt) for index in indices]
        if self.tokenizer is not None:
            group = Group("ids", prompt_length=self._prompt_lengths.get(prompt or ""))
            encodings = self.tokenizer.encode(texts, reading.side)
            are_cut = [bool(encoding.overflowing) for encoding in encodings]
            batch = [_ids_row(group, encoding) for encoding in encodings]
        elif reading.side == "left":
            raise InputError(f"{self.name} truncates texts on the right only; leave out the side")
        else:
            counts = [len(ids) for ids in encoder.token_ids(texts)]
            are_cut = [count > self.max_tokens for count in counts]
            batch = []
            for index, count in zip(indices, counts, strict=True):
                text = rows[index].value
                group = Group("text" if isinstance(text, str) else "pair", role, prompt)
                batch.append(Row(group, text, None, min(count, self.max_tokens)))
        for index, row, text, is_cut in zip(indices, batch, texts, are_cut, strict=True):
            rows[index] = row
            if is_cut and not reading.truncate:
                (ids,) = encoder.token_ids([text])
                raise TooLongError(names[index], f"{len(ids):,} tokens", self.max_tokens)
        return compress(indices, are_cut)

    def warm_up(self) -> None:
        items: list[Any] = []
        if "text" in self.modalities:
            items += ["a", "many words " * 8]
        if "image" in self.modalities:
            items.append(Picture(b"", black_square()))
        pairs = ((0, 1), (1, 1)) if self.encoder.use == "ranking" else ()
        reading = Reading(pairs=pairs, scoring="activation")
        work = self.read(items, [""] * len(items), reading, lambda: None)
        for result in self.answer([work]):
            if isinstance(result, Exception):
                raise result

    def answer(self, works: Sequence[Work]) -> list[Any]:
        rows = [row for work in works for row in work.items]
        groups: dict[Group, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.group, []).append(index)
        outputs = np.zeros((len(rows), self.width), np.float32)
        failures = dict[int, Exception]()
        for group, indices in groups.items():
            for batch in self._passes(rows, indices):
                if not any(work.needed() for work in works):
                    return [InputError("the request has ended")] * len(works)
                inputs = self._inputs(group, rows, batch, failures)
                if inputs is None:
                    continue
                read = [index for index in batch if index not in failures]
                outputs[read] = self.encoder.run(inputs).numpy()
        results, end = list[Any](), 0
        for work in works:
            start, end = end, end + len(work.items)
            failure = next(
                (failures[index] for index in range(start, end) if index in failures), None
            )
            results.append(failure or self._result(work, outputs[start:end]))
        return results

    def _passes(self, rows: Sequence[Row], indices: list[int]) -> Iterator[list[int]]:
        """Yield the rows of each forward pass: images, or texts of similar length, so that little is padding."""
        indices.sort(key=lambda index: -rows[index].length)
        start = 0
        while start < len(indices):
            first = rows[indices[start]]
            count = max(1, self.batch_tokens // max(1, first.length))
            if first.group.form == "image":
                count = _IMAGES_TOGETHER
            yield indices[start : start + count]
            start += count

    def _inputs(
        self, group: Group, rows: Sequence[Row], batch: list[int], failures: dict[int, Exception]
    ) -> dict[str, Any] | None:
        """Make the inputs of one forward pass, or None if all its images are damaged."""
        if group.form == "ids":
            assert self.tokenizer is not None
            inputs = self.tokenizer.inputs([rows[index] for index in batch], self._names)
            if group.prompt_length is not None:
                inputs["prompt_length"] = group.prompt_length
            return inputs
        values = [rows[index].value for index in batch]
        if group.form == "image":
            values = []
            for index in batch:
                image = _decode(rows[index].value)
                if isinstance(image, Exception):
                    failures[index] = image
                else:
                    values.append(image)
        return self.encoder.prepare(values, group.role, group.prompt or "") if values else None

    def _result(self, work: Work, values: np.ndarray) -> np.ndarray:
        """Return features `[items, width]`, or scores."""
        reading = work.reading
        if self.encoder.use == "ranking":
            scores = torch.from_numpy(values)
            if reading.scoring == "activation":
                scores = self.encoder.model.activation_fn(scores)
            elif reading.scoring == "probability":
                scores = scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1)
            return (scores.squeeze(1) if scores.shape[1] == 1 else scores).numpy()
        if self.encoder.use == "embedding" and (reading.normalise or reading.pairs):
            values = normalised(values)
        if not reading.pairs:
            return values
        first, second = np.array(reading.pairs).T
        return (1 + (values[first] * values[second]).sum(1)) / 2


def normalised(features: np.ndarray) -> np.ndarray:
    """Divide rows by their L2 norms."""
    norms = np.sqrt(np.einsum("nd,nd->n", features, features))
    return features / np.maximum(norms, 1e-12)[:, None]


def _ids_row(group: Group, encoding: Any) -> Row:
    ids = np.array(encoding.ids, np.int32)
    return Row(group, ids, np.array(encoding.type_ids, np.uint8), len(ids))


def _slices(inputs: Sequence[Any], divide: bool) -> Iterator[list[int]]:
    """Yield indices of texts of at most `_SLICE_CHARACTERS`, or of one; `divide` the first from the others."""
    indices, characters = list[int](), 0
    for index, text in enumerate(inputs):
        if isinstance(text, Picture):
            continue
        size = len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
        is_first = divide and indices == [0]
        if is_first or (indices and characters + size > _SLICE_CHARACTERS):
            yield indices
            indices, characters = [], 0
        indices.append(index)
        characters += size
    if indices:
        yield indices


def _prompted(text: Text, prompt: str | None) -> Text:
    if not prompt:
        return text
    return prompt + text if isinstance(text, str) else (prompt + text[0], text[1])


def _decode(picture: Picture) -> Image.Image | XFMError:
    """Decode an image, or return its error."""
    try:
        if not picture.needed():
            return InputError("the request has ended")
        return decode_image(picture.content, picture.name)
    except DataError as error:
        return error
    except MemoryError:
        return DataError(f"{picture.name} needs more memory to decode than there is; shrink it")


def _reads_by_role(encoder: LibraryEncoder) -> bool:
    """Return whether the model reads queries otherwise than documents, beside their prompts."""
    module = encoder.model[0]
    return "Transformer" not in {cls.__name__ for cls in type(module).__mro__} or any(
        getattr(module, name, None) is not None
        for name in ("query_length", "document_length", "query_expansion")
    )


def load_library_model(source: Source, name: str | None = None) -> LibraryModel:
    """Open a model of sentence-transformers; one in 8 bits is compared with fp32 on captions."""
    encoder = open_encoder(source)
    assert isinstance(encoder, LibraryEncoder)
    quality = ""
    if source.dtype in ("int8", "fp8"):
        quality = compare(encoder, open_encoder(replace(source, dtype=None)))
    return LibraryModel(encoder, name, quality)


def compare(encoder: Encoder, reference: Encoder) -> str:
    """Describe how close the results of a model on generated captions are to those of a reference."""
    from xfm_fast.export.library import neighbour_agreement

    scenes = [scene(0, index) for index in range(_CAPTIONS)]
    items: Any = [captions(scene)[0] for scene in scenes]
    if encoder.use == "ranking":
        items = [(items[0], caption) for caption in items]
    elif "text" not in encoder.modalities:
        items = [Image.fromarray(render(scene)) for scene in scenes]
    values, truth = (model.run(model.prepare(items)) for model in (encoder, reference))
    if encoder.use == "ranking":
        error = (values - truth).abs().max() / truth.abs().max()
        best, expected = (
            {*scores[:, 0].topk(_BEST).indices.tolist()} for scores in (values, truth)
        )
        return (
            f"scores within {error:.1%} of fp32 and {len(best & expected)} of the {_BEST} best kept on "
            f"{_CAPTIONS} captions"
        )
    cosine = torch.cosine_similarity(values, truth).min()
    agreement = neighbour_agreement(values, truth, 0, _BEST)
    assert agreement is not None
    return (
        f"least cosine {cosine:.4f} to fp32 and {agreement[2]:.0%} of {_BEST} nearest neighbours kept on "
        f"{_CAPTIONS} captions"
    )
