"""Record schemas of fine-tuning tasks, and rows in memory that are validated when they are read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from xfm_fast.data.files import file_of, read_json, unreadable
from xfm_fast.errors import DataError

# Examples in a message, and characters of each.
_EXAMPLES, _EXAMPLE_LENGTH = 3, 60
ARRAY = "one JSON array of objects, [{...}, {...}]"


def _require_text(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "it holds no text")
    return text


Text = Annotated[str, AfterValidator(_require_text)]
Identity = int | Text
Texts = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]
Label = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    AfterValidator(_require_text),
]


class Annotation(BaseModel):
    """One element of a fine-tuning file; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)


class RetrievalRecord(Annotation):
    """An image and one caption; captions of one image share its `image_id`."""

    image: Text = Field(description="path below the image folder")
    caption: Text
    image_id: Identity


class RetrievalTestRecord(Annotation):
    """An image and all its captions."""

    image: Text
    caption: Texts


class _Captioned(Annotation):
    image: Text
    image_id: Identity | None = None

    @property
    def identity(self) -> int | str:
        """`image_id`, else the digits after the last `_` of the file name, else the file name."""
        return self.image_id if self.image_id is not None else identity_of(self.image)


class CaptioningRecord(_Captioned):
    """An image, with a caption for training."""

    caption: Text | None = None


class CaptioningTestRecord(_Captioned):
    """An image with all its captions, if they are known."""

    caption: Texts | None = None


class TextRecord(Annotation):
    """A text or text pair, optionally with a class."""

    text: Text
    text2: Text | None = None
    label: Label | None = None
    index: int | None = Field(
        default=None, description="the number that a benchmark's result file gives it"
    )


class TextScoreRecord(Annotation):
    """A text or text pair, optionally with a score."""

    text: Text
    text2: Text | None = None
    label: Annotated[float, Field(allow_inf_nan=False)] | None = None
    index: int | None = None


class ImageLabelRecord(Annotation):
    """An image, optionally with a class."""

    image: Text
    label: Label | None = None


Row = TypeVar("Row", bound=Annotation | Mapping[str, Any])
RecordT = TypeVar("RecordT", bound=Annotation)


def read_array(path: str | os.PathLike[str]) -> Sequence[Any]:
    """Read the elements of a JSON array file, unvalidated."""
    path = Path(path)
    return array_of(
        path, read_json(path, ARRAY, lines=", not one object per line as in pretraining")
    )


def array_of(
    path: Path, content: Any, expected: str = "one array of objects, [{...}, {...}]"
) -> list[Any]:
    """Check that content is a non-empty array; `expected` describes the accepted formats."""
    if not isinstance(content, list):
        raise DataError(f"{path} holds a JSON {type(content).__name__}; expected {expected}")
    if not content:
        raise DataError(f"{path} holds no elements; give at least one")
    return content


def parse_annotation(element: Any, record_type: type[RecordT]) -> RecordT:
    """Validate one element."""
    if isinstance(element, DataError):
        raise DataError(str(element))
    if not isinstance(element, dict):
        fields = ", ".join(record_type.model_fields)
        raise DataError(f"is a {type(element).__name__}; expected an object with {fields}")
    try:
        return record_type.model_validate(element)
    except ValidationError as error:
        reasons = [_explain(problem, element) for problem in error.errors()]
        raise DataError("; ".join(dict.fromkeys(reasons))) from None


def _explain(problem: Mapping[str, Any], element: Mapping[str, Any]) -> str:
    """Rephrase one of pydantic's errors with the field and its value."""
    if problem["type"] == "box":
        return f"box {element.get('bbox')} {problem['msg']}; correct or remove it"
    field = repr(str(problem["loc"][0]))
    if problem["type"] == "missing":
        return f"{field} is missing"
    value = repr(problem["input"])
    if len(value) > _EXAMPLE_LENGTH:
        value = value[:_EXAMPLE_LENGTH] + "..."
    return f"{field} is {value} ({problem['msg'].lower()})"


class AnnotationRows(Generic[Row]):
    """Rows in memory, read from a file or given as a list.

    Attributes:
        name: Path of the file, or a name in messages.
        elements: Mappings of fields, or a `DataError` for a broken element.
        record_type: Validates an element when it is read: a record class, or a function that parses
            an element. Without one, elements are mappings of fields.
        labels: Names of elements in messages; None counts them from 0.
        notes: Messages of the reader, such as what it dropped.
        modified: Modification time in nanoseconds; by default that of the file and of further
            `sources`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        elements: Sequence[Any],
        record_type: type[Row] | Callable[[Any], Row] | None = None,
        *,
        labels: Sequence[int | str] | None = None,
        notes: tuple[str, ...] = (),
        sources: Sequence[Path] = (),
        modified: int | None = None,
    ) -> None:
        self.name, self.elements, self.record_type = os.fspath(path), elements, record_type
        self.labels, self.notes = labels, notes
        if modified is None:
            try:
                modified = max(os.stat(source).st_mtime_ns for source in (path, *sources))
            except OSError as error:
                raise unreadable(Path(path), error) from None
        self.modified = modified

    def __len__(self) -> int:
        return len(self.elements)

    def label(self, row: int) -> int | str:
        return f"element {row}" if self.labels is None else self.labels[row]

    def raw(self, row: int) -> bytes:
        text = json.dumps(self.elements[row], default=str, ensure_ascii=False)
        return text.encode("utf-8", "replace")

    def about(self, images: Collection[str], *, inverted: bool = False) -> AnnotationRows[Row]:
        """Select the rows about the given images; with `inverted` all but these."""
        rows = [
            row
            for row, element in enumerate(self.elements)
            if any(name in images for name in _names(element)) != inverted
        ]
        return self.select(rows)

    def select(self, rows: Sequence[int]) -> AnnotationRows[Row]:
        """Select rows, which keep their labels."""
        selection = copy(self)
        selection.elements = [self.elements[row] for row in rows]
        selection.labels = [self.label(row) for row in rows]
        return selection

    def read(self, row: int) -> Row:
        """Validate a row."""
        element: Any = self.elements[row]
        record_type: Any = self.record_type
        if isinstance(record_type, type):
            return parse_annotation(element, record_type)
        if record_type is not None:
            return record_type(element)
        if not isinstance(element, Mapping):
            name = type(element).__name__
            raise DataError(f"the record is of type {name} instead of a mapping of fields")
        return cast("Row", element)

    def records(self) -> Iterator[Row]:
        """Validate all rows in order; a broken element raises `DataError`."""
        for row in range(len(self)):
            try:
                yield self.read(row)
            except DataError as error:
                label = self.label(row)
                where = f"line {label}" if isinstance(label, int) else label
                raise DataError(
                    f"{self.name}, {where}: {error} (a metric needs every element of its split: "
                    "mend or remove it)"
                ) from None


def as_rows(
    files: Iterable[AnnotationRows[Any]], record_type: type[RecordT]
) -> list[AnnotationRows[RecordT]]:
    """Set the record type of the rows of several files."""
    typed = list(files)
    for rows in typed:
        rows.record_type = record_type
    return typed


def label_names(files: Iterable[AnnotationRows[Any]]) -> list[str]:
    """Return the sorted class names of all rows; rows without any raise `DataError`."""
    names = set[str]()
    for rows in files:
        for element in rows.elements:
            label = element.get("label") if isinstance(element, dict) else None
            if label not in (None, ""):
                names.add(str(label))
    if not names:
        raise DataError("no row has a label; name the column that holds the classes")
    return sorted(names)


def image_names(items: Iterable[Any]) -> Iterator[str]:
    """Yield the image names of rows, records or paths, with repetitions."""
    for item in items:
        if isinstance(item, AnnotationRows):
            for element in item.elements:
                yield from (name for name in _names(element) if isinstance(name, str))
        elif isinstance(item, Annotation):
            # A record has one of these fields.
            yield from getattr(item, "images", None) or (getattr(item, "image"),)  # noqa: B009
        else:
            yield os.fspath(item)


def _names(element: Any) -> Sequence[Any]:
    """Return the image names in an unvalidated element, which may be anything."""
    if not isinstance(element, dict):
        return ()
    return element.get("images") or (element.get("image"),)


def check_images(items: Iterable[Any], root: str | os.PathLike[str]) -> None:
    """Check that all images exist below `root`, without opening them."""
    names = dict.fromkeys(image_names(items))
    absent = [name for name in names if not os.path.isfile(file_of(os.path.join(root, name)))]
    if absent:
        examples = ", ".join(map(repr, absent[:_EXAMPLES]))
        raise DataError(
            f"{len(absent)} of {len(names)} images do not exist below {os.fspath(root)}: "
            f"{examples}{', ...' * (len(absent) > _EXAMPLES)}; check the image folder (data.images)"
        )


class Overlap(NamedTuple):
    """How much two splits share, and the first examples."""

    total: int
    examples: tuple[str, ...]


def overlap(a: Iterable[Any], b: Iterable[Any]) -> Overlap:
    """Find the images that two splits share, in the order of `b`."""
    return _shared(map(os.path.normpath, image_names(a)), map(os.path.normpath, image_names(b)))


def overlap_of_texts(a: Iterable[Any], b: Iterable[Any]) -> Overlap:
    """Find the texts or text pairs that two splits share."""
    shared = _shared(_texts(a), _texts(b))
    return shared._replace(examples=tuple(text[:_EXAMPLE_LENGTH] for text in shared.examples))


def _shared(a: Iterable[str], b: Iterable[str]) -> Overlap:
    first = set(a)
    shared = [name for name in dict.fromkeys(b) if name in first]
    return Overlap(len(shared), tuple(shared[:_EXAMPLES]))


def _texts(items: Iterable[Any]) -> Iterator[str]:
    for item in items:
        for row in item.elements if isinstance(item, AnnotationRows) else [item.model_dump()]:
            if isinstance(row, dict):
                fields = (row.get("text"), row.get("text2"))
                yield " / ".join(str(field) for field in fields if field is not None)


def identity_of(image: str) -> int | str:
    """Return the digits after the last `_` of a file name, COCO_val2014_000000000042.jpg → 42, else the name."""
    digits = re.fullmatch(r"(?:.*_)?(\d+)", Path(image).stem, re.ASCII)
    return int(digits[1]) if digits else Path(image).name
