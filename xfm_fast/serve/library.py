"""A model of sentence-transformers behind the service: an embedder, a sparse encoder or a cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xfm_fast.data.shapes import captions, render, scene
from xfm_fast.encoders import LibraryEncoder, Role, Use, open_encoder
from xfm_fast.errors import DataError, InputError, XFMError
from xfm_fast.loading import Source
from xfm_fast.serve.model import (
    Ability,
    Content,
    Pairs,
    Reading,
    Scoring,
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
# Captions on which a model in 8 bits is compared with fp32, and neighbours of each.
_CAPTIONS, _NEAREST = 128, 10

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
        tokenizer = encoder.model.tokenizer
        self._whole = deepcopy(tokenizer.backend_tokenizer)
        self._whole.no_padding()
        self._whole.no_truncation()
        self._max_tokens = max_tokens
        self._by_side: dict[Side, Any] = {
            side: self._truncating(side) for side in ("left", "right")
        }
        self._pad, self._pad_type = tokenizer.pad_token_id or 0, tokenizer.pad_token_type_id
        self._pads_left = tokenizer.padding_side == "left"

    def _truncating(self, side: Side) -> Any:
        tokenizer = deepcopy(self._whole)
        if self._max_tokens < _UNLIMITED:
            tokenizer.enable_truncation(self._max_tokens, direction=side)
        return tokenizer

    def encode(self, texts: Sequence[Text], side: Side) -> list[Any]:
        """Encode texts or pairs of texts, truncated."""
        return self._by_side[side].encode_batch_fast(texts)

    def describe(self, texts: Sequence[str], special: bool) -> list[list[dict[str, Any]]]:
        """Describe the tokens of whole texts in TEI's form; `special` adds special ones."""
        descriptions = []
        for encoding in self._whole.encode_batch([*texts], add_special_tokens=special):
            rows = zip(
                encoding.ids,
                encoding.tokens,
                map(bool, encoding.special_tokens_mask),
                encoding.offsets,
                strict=True,
            )
            tokens = []
            for token, text, is_special, offsets in rows:
                start, stop = (None, None) if is_special else offsets
                tokens.append(
                    {"id": token, "text": text, "special": is_special, "start": start, "stop": stop}
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
        self.device = encoder.device
        self.max_tokens = min(encoder.max_tokens or _UNLIMITED, _UNLIMITED)
        self.labels = _labels(encoder)
        # Pooling may leave out the prompt, whose length all texts of a forward pass then share.
        self._pools_prompts = all(
            getattr(module, "include_prompt", True) for module in encoder.model
        )
        self._prompt_lengths: dict[str, int | None] = {}
        self._names: list[str] = []
        self.tokenizer = self._fast_tokenizer()
        self.quick = self.tokenizer is not None

    @property
    def width(self) -> int:
        return self.encoder.width

    def _fast_tokenizer(self) -> FastTokenizer | None:
        """Return the fast tokenizer if its inputs are the library's."""
        encoder = self.encoder
        if "text" not in self.modalities or not hasattr(
            encoder.model.tokenizer, "backend_tokenizer"
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
            if not same or _reads_by_role(encoder):
                return None
        return fast

    def choose_scoring(self, is_text: Sequence[bool], pairs: Pairs, reading: Reading) -> Scoring:
        if reading.scoring is not None and self.encoder.use == "ranking":
            return reading.scoring
        return "probability" if self.encoder.use == "ranking" else "similarity"

    def read(
        self,
        contents: Sequence[Content],
        names: Sequence[str],
        pairs: Pairs,
        scoring: Scoring,
        reading: Reading,
        check: Callable[[], object],
    ) -> Work:
        encoder = self.encoder
        for content, name in zip(contents, names, strict=True):
            modality = "image" if isinstance(content, Picture) else "text"
            if modality not in self.modalities:
                readable = " and ".join(self.modalities)
                raise InputError(f"{name} is {modality}, and {self.name} reads {readable}")
        inputs: Sequence[Any] = contents
        sources: Sequence[int] = range(len(contents))
        if encoder.use == "ranking":
            inputs = [
                contents[first] if first == second else (contents[first], contents[second])
                for first, second in pairs
            ]
            sources, pairs = [second for _, second in pairs], ()
        rows = [Row(Group("image"), content, None, 1) for content in inputs]
        texts = [index for index, content in enumerate(inputs) if not isinstance(content, Picture)]
        settings = [self._settings(reading, reading.role)]
        if reading.following is not None:
            settings.append(self._settings(reading, reading.following))
        truncated = list[int]()
        for span in _slices([inputs[index] for index in texts]):
            check()
            indices = texts[span]
            batch = [settings[0 if index == 0 else -1] for index in indices]
            prompted = [
                _prompted(inputs[index], prompt)
                for index, (_, _, prompt) in zip(indices, batch, strict=True)
            ]
            are_cut = self._read_texts(rows, indices, batch, prompted, reading.side)
            for index, text, is_cut in zip(indices, prompted, are_cut, strict=True):
                if not is_cut:
                    continue
                truncated.append(sources[index])
                if not reading.truncate:
                    (ids,) = encoder.token_ids([text])
                    raise TooLongError(
                        names[sources[index]], f"{len(ids):,} tokens", self.max_tokens
                    )
        tokens = sum(row.length for row in rows)
        return Work(tuple(rows), pairs, scoring, tokens, tuple(truncated), reading.normalise)

    def _settings(
        self, reading: Reading, role: Role | None
    ) -> tuple[Group, Role | None, str | None]:
        """Return what texts of a role share in a forward pass, the role, and its prompt."""
        role = None if self.encoder.use == "ranking" else role
        prompt = self.encoder.prompt(role, reading.prompt)
        return Group("ids", None, None, self._prompt_length(prompt)), role, prompt

    def _read_texts(
        self,
        rows: list[Row],
        indices: Sequence[int],
        settings: Sequence[tuple[Group, Role | None, str | None]],
        texts: Sequence[Text],
        side: Side,
    ) -> list[bool]:
        """Replace the rows of texts; returns whether each is truncated."""
        columns = zip(indices, settings, strict=True)
        if self.tokenizer is not None:
            encodings = self.tokenizer.encode(texts, side)
            for (index, (group, _, _)), encoding in zip(columns, encodings, strict=True):
                rows[index] = _ids_row(group, encoding)
            return [bool(encoding.overflowing) for encoding in encodings]
        if side == "left":
            raise InputError(f"{self.name} truncates texts on the right only; leave out the side")
        counts = [len(ids) for ids in self.encoder.token_ids(texts)]
        for (index, (_, role, prompt)), count in zip(columns, counts, strict=True):
            text = rows[index].value
            group = Group("text" if isinstance(text, str) else "pair", role, prompt)
            rows[index] = Row(group, text, None, min(count, self.max_tokens))
        return [count > self.max_tokens for count in counts]

    def _prompt_length(self, prompt: str | None) -> int | None:
        if not prompt or self._pools_prompts:
            return None
        if prompt not in self._prompt_lengths:
            sample = self.encoder.prepare(["a"], prompt=prompt)
            self._prompt_lengths[prompt] = sample.get("prompt_length")
        return self._prompt_lengths[prompt]

    def cost(self, work: Work) -> int:
        return work.tokens

    def warm_up(self) -> None:
        items: list[Any] = []
        if "text" in self.modalities:
            items += ["a", "many words " * 8]
        if "image" in self.modalities:
            items.append(Picture(b"", black_square()))
        pairs = ((0, 1), (1, 1)) if self.encoder.use == "ranking" else ()
        names = [""] * len(items)
        work = self.read(items, names, pairs, "activation", Reading(), lambda: None)
        for result in self.answer([work]):
            if isinstance(result, Exception):
                raise result

    @property
    def dtype(self) -> str:
        return self.encoder.source.dtype or "fp32"

    def answer(self, works: Sequence[Work]) -> list[Any]:
        rows = [row for work in works for row in work.items]
        groups: dict[Group, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.group, []).append(index)
        outputs = np.empty(0, np.float32)
        failures = dict[int, Exception]()
        for group, indices in groups.items():
            for batch in self._passes(rows, indices, group.form == "image"):
                if not any(work.needed() for work in works):
                    return [InputError("the request has ended")] * len(works)
                inputs = self._inputs(group, rows, batch, failures)
                if inputs is None:
                    continue
                features = self.encoder.run(inputs).numpy()
                if not outputs.size:
                    outputs = np.zeros((len(rows), features.shape[1]), np.float32)
                outputs[[index for index in batch if index not in failures]] = features
        results, end = list[Any](), 0
        for work in works:
            start, end = end, end + len(work.items)
            failure = next(
                (failures[index] for index in range(start, end) if index in failures), None
            )
            results.append(failure or self._result(work, outputs[start:end]))
        return results

    def _passes(self, rows: Sequence[Row], indices: list[int], images: bool) -> Iterator[list[int]]:
        """Yield the rows of each forward pass: images, or texts of similar length, so that little is padding."""
        if images:
            for start in range(0, len(indices), _IMAGES_TOGETHER):
                yield indices[start : start + _IMAGES_TOGETHER]
            return
        indices.sort(key=lambda index: -rows[index].length)
        start = 0
        while start < len(indices):
            count = max(1, self.batch_tokens // max(1, rows[indices[start]].length))
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
        if self.encoder.use == "embedding" and (work.normalise or work.pairs):
            values = normalised(values)
        if work.pairs:
            first, second = np.array(work.pairs).T
            return (1 + (values[first] * values[second]).sum(1)) / 2
        if self.encoder.use != "ranking":
            return values
        scores = torch.from_numpy(values)
        if work.scoring == "activation":
            scores = self.encoder.model.activation_fn(scores)
        elif work.scoring == "probability":
            scores = scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1)
        return (scores.squeeze(1) if scores.shape[1] == 1 else scores).numpy()


def normalised(features: np.ndarray) -> np.ndarray:
    """Divide rows by their L2 norms."""
    norms = np.sqrt(np.einsum("nd,nd->n", features, features))
    return features / np.maximum(norms, 1e-12)[:, None]


def _ids_row(group: Group, encoding: Any) -> Row:
    ids = np.array(encoding.ids, np.int32)
    return Row(group, ids, np.array(encoding.type_ids, np.uint8), len(ids))


def _slices(texts: Sequence[Text]) -> Iterator[slice]:
    """Yield consecutive ranges of texts of at most `_SLICE_CHARACTERS`, or of one text."""
    start, characters = 0, 0
    for index, text in enumerate(texts):
        size = len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
        if index > start and characters + size > _SLICE_CHARACTERS:
            yield slice(start, index)
            start, characters = index, 0
        characters += size
    if texts:
        yield slice(start, len(texts))


def _prompted(text: Text, prompt: str | None) -> Text:
    if not prompt:
        return text
    return prompt + text if isinstance(text, str) else (prompt + text[0], text[1])


def _decode(picture: Picture) -> Image.Image | XFMError:
    """Decode an image, or return its error."""
    import io

    if not picture.needed():
        return InputError("the request has ended")
    try:
        return Image.open(io.BytesIO(picture.content)).convert("RGB")
    except MemoryError:
        return DataError(f"{picture.name} needs more memory to decode than there is; shrink it")
    except Exception as error:  # Pillow raises anything for a damaged file
        return DataError(f"{picture.name} is damaged ({error}); send it again")


def _reads_by_role(encoder: LibraryEncoder) -> bool:
    """Return whether the model reads queries otherwise than documents, beside their prompts."""
    module = encoder.model[0]
    return "Transformer" not in {cls.__name__ for cls in type(module).__mro__} or any(
        getattr(module, name, None) is not None
        for name in ("query_length", "document_length", "query_expansion")
    )


def _labels(encoder: LibraryEncoder) -> list[str]:
    """Return the names of a classifier's labels."""
    if encoder.use != "ranking":
        return []
    labels = getattr(encoder.model.config, "id2label", None) or {}
    return [str(labels.get(index, f"LABEL_{index}")) for index in range(encoder.width)]


def load_library_model(source: Source, name: str | None = None) -> LibraryModel:
    """Open a model of sentence-transformers; one in 8 bits is compared with fp32 on captions."""
    encoder = open_encoder(source)
    assert isinstance(encoder, LibraryEncoder)
    quality = ""
    if source.dtype in ("int8", "fp8"):
        reference = open_encoder(replace(source, dtype=None))
        assert isinstance(reference, LibraryEncoder)
        quality = compare(encoder, reference)
    return LibraryModel(encoder, name, quality)


def compare(encoder: LibraryEncoder, reference: LibraryEncoder) -> str:
    """Describe how close the results of a model on generated captions are to those of a reference."""
    scenes = [scene(0, index) for index in range(_CAPTIONS)]
    items: Any = [captions(scene)[0] for scene in scenes]
    if encoder.use == "ranking":
        pairs = [(items[0], caption) for caption in items]
        scores, truth = (model.run(model.prepare(pairs)) for model in (encoder, reference))
        error = (scores - truth).abs().max() / truth.abs().max()
        shared = _shared(
            scores[:, 0].argsort(descending=True), truth[:, 0].argsort(descending=True)
        )
        return (
            f"scores within {error:.1%} of fp32 and {shared:.0%} of the {_NEAREST} best kept on "
            f"{len(pairs)} captions"
        )
    if "text" not in encoder.modalities:
        items = [Image.fromarray(render(scene)) for scene in scenes]
    rows, truth = (
        normalised(model.run(model.prepare(items)).numpy()) for model in (encoder, reference)
    )
    cosine = float((rows * truth).sum(1).min())
    orders = [np.argsort(-(matrix @ matrix.T), kind="stable")[:, 1:] for matrix in (rows, truth)]
    shares = [_shared(*order) for order in zip(*orders, strict=True)]
    return (
        f"least cosine {cosine:.4f} to fp32 and {np.mean(shares):.0%} of {_NEAREST} nearest neighbours kept on "
        f"{len(items)} captions"
    )


def _shared(order: Any, expected: Any) -> float:
    """Return the share of the first entries of an order that are among the first expected."""
    return len({*order[:_NEAREST].tolist()} & {*expected[:_NEAREST].tolist()}) / _NEAREST
