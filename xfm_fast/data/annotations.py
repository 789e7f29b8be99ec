"""Record schemas of fine-tuning tasks, validated row by row."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from xfm_fast.data.files import file_of, read_json, unreadable
from xfm_fast.errors import DataError

_SHOWN, _LONGEST = 3, 60
ARRAY = "one JSON array of objects, [{...}, {...}]"


def _no_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "it holds no text")
    return text


Text = Annotated[str, AfterValidator(_no_blank)]
Identity = int | Text
Texts = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]
Label = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    AfterValidator(_no_blank),
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
    """An image with all known captions."""

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


Record = TypeVar("Record", bound=Annotation | Mapping[str, Any])
Kind = TypeVar("Kind", bound=Annotation)


def read_array(path: str | os.PathLike[str]) -> Sequence[Any]:
    """Elements of a JSON array file, unvalidated."""
    path = Path(path)
    return array_of(path, read_json(path, ARRAY, lines=", not one object a line as in pretraining"))


def array_of(
    path: Path, content: Any, known: str = "one array of objects, [{...}, {...}]"
) -> list[Any]:
    """Check that content is a non-empty array; `known` describes the expected formats."""
    if not isinstance(content, list):
        raise DataError(f"{path} holds a JSON {type(content).__name__}; expected {known}")
    if not content:
        raise DataError(f"{path} holds no elements; give at least one")
    return content


def parse_annotation(element: Any, kind: type[Kind]) -> Kind:
    """Validate one element."""
    if isinstance(element, DataError):
        raise DataError(str(element))
    if not isinstance(element, dict):
        raise DataError(
            f"is a {type(element).__name__}; expected an object with {', '.join(kind.model_fields)}"
        )
    try:
        return kind.model_validate(element)
    except ValidationError as error:
        wrong = []
        for problem in error.errors():
            given = repr(problem["input"])
            held = f"{given[:60] + '...' if len(given) > 60 else given} ({problem['msg'].lower()})"
            if problem["type"] == "box":
                wrong.append(f"box {element.get('bbox')} {problem['msg']}; correct or remove it")
            else:
                wrong.append(
                    f"{str(problem['loc'][0])!r} is {'missing' if problem['type'] == 'missing' else held}"
                )
        raise DataError("; ".join(dict.fromkeys(wrong))) from None


class Elements(NamedTuple):
    """Unvalidated elements of a file."""

    name: str  # path
    values: Sequence[Any]  # mappings of fields, or a `DataError` for a broken element
    labels: Sequence[int | str] | None = None  # element names in messages; None numbers them from 0
    notes: tuple[str, ...] = ()  # what the reader dropped
    others: tuple[Path, ...] = ()  # further source files


class AnnotationRows(Generic[Record]):
    """Elements of a file as `Rows`, validated when read: as a record type, or by a function that parses an element."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        elements: Sequence[Any],
        kind: type[Record] | Callable[[Any], Record],
        *,
        labels: Sequence[int | str] | None = None,
        notes: Sequence[str] = (),
        others: Sequence[Path] = (),
    ) -> None:
        self.name, self.elements, self.kind, self.notes = (
            os.fspath(path),
            elements,
            kind,
            tuple(notes),
        )
        self._labels = labels
        try:
            self.modified = max(os.stat(each).st_mtime_ns for each in (path, *others))
        except OSError as error:
            raise unreadable(Path(path), error) from None

    def __len__(self) -> int:
        return len(self.elements)

    def label(self, row: int) -> int | str:
        return f"element {row}" if self._labels is None else self._labels[row]

    def raw(self, row: int) -> bytes:
        return json.dumps(self.elements[row], default=str, ensure_ascii=False).encode(
            "utf-8", "replace"
        )

    def of_images(self, images: Collection[str], *, others: bool = False) -> AnnotationRows[Record]:
        """Rows about the given images, or with `others` all other rows."""
        named = [each if isinstance(each, dict) else {} for each in self.elements]
        about = [
            any(name in images for name in each.get("images") or (each.get("image"),))
            for each in named
        ]
        return self.select([row for row, inside in enumerate(about) if inside != others])

    def select(self, rows: Sequence[int]) -> AnnotationRows[Record]:
        """Some of the rows, with their labels."""
        found = copy(self)
        found.elements, found._labels = (
            [self.elements[row] for row in rows],
            [self.label(row) for row in rows],
        )
        return found

    def read(self, row: int) -> Record:
        """Validated record of a row."""
        kind: Any = self.kind
        return (
            parse_annotation(self.elements[row], kind)
            if isinstance(kind, type)
            else kind(self.elements[row])
        )

    def records(self) -> Iterator[Record]:
        """All records in order; a broken element raises `DataError`."""
        for row in range(len(self)):
            try:
                yield self.read(row)
            except DataError as error:
                label = self.label(row)
                place = f"line {label}" if isinstance(label, int) else label
                raise DataError(
                    f"{self.name}, {place}: {error} (a metric needs every element of its split: mend or remove it)"
                ) from None


def as_rows(elements: Iterable[Elements], kind: type[Kind]) -> list[AnnotationRows[Kind]]:
    """Wrap elements of several files as rows of one record type."""
    return [
        AnnotationRows(
            each.name, each.values, kind, labels=each.labels, notes=each.notes, others=each.others
        )
        for each in elements
    ]


def label_names(rows: Iterable[AnnotationRows[Any]]) -> list[str]:
    """Sorted class names of all rows; no labels raise `DataError`."""
    found = {
        str(label)
        for each in rows
        for element in each.elements
        if isinstance(element, dict) and (label := element.get("label")) not in (None, "")
    }
    if not found:
        raise DataError("no row has a label; name the column that holds the classes")
    return sorted(found)


class Named(NamedTuple):
    """Count and the first three examples."""

    number: int
    first: tuple[str, ...]


def image_names(items: Iterable[Any]) -> Iterator[str]:
    """Image names of rows, records or paths, with repetitions."""
    for item in items:
        if isinstance(item, AnnotationRows):
            for element in item.elements:
                if isinstance(element, dict):
                    names = element.get("images") or (element.get("image"),)
                    yield from (name for name in names if isinstance(name, str))
        elif isinstance(item, Annotation):
            yield from getattr(item, "images", None) or (getattr(item, "image"),)  # noqa: B009, not of every kind
        else:
            yield os.fspath(item)


def check_images(items: Iterable[Any], root: str | os.PathLike[str]) -> None:
    """Check that all images exist below `root`, without opening them."""
    names = dict.fromkeys(image_names(items))
    absent = [name for name in names if not os.path.isfile(file_of(os.path.join(root, name)))]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(names)} images do not exist below {os.fspath(root)}: "
            f"{', '.join(map(repr, absent[:_SHOWN]))}{', ...' * (len(absent) > _SHOWN)}; check the image folder "
            "(data.images)"
        )


def overlap(a: Iterable[Any], b: Iterable[Any]) -> Named:
    """Images shared by two splits, in the order of `b`."""
    return _shared(map(os.path.normpath, image_names(a)), map(os.path.normpath, image_names(b)))


def overlap_of_texts(a: Iterable[Any], b: Iterable[Any]) -> Named:
    """Texts or text pairs shared by two splits."""
    found = _shared(_texts(a), _texts(b))
    return found._replace(first=tuple(text[:_LONGEST] for text in found.first))


def _shared(a: Iterable[str], b: Iterable[str]) -> Named:
    known = set(a)
    shared = [name for name in dict.fromkeys(b) if name in known]
    return Named(len(shared), tuple(shared[:_SHOWN]))


def _texts(items: Iterable[Any]) -> Iterator[str]:
    for item in items:
        for row in item.elements if isinstance(item, AnnotationRows) else [item.model_dump()]:
            if isinstance(row, dict):
                yield " / ".join(
                    str(row[name]) for name in ("text", "text2") if row.get(name) is not None
                )


def identity_of(image: str) -> int | str:
    """Digits after the last `_` of a file name (COCO_val2014_000000000042.jpg → 42), else the name."""
    stem = Path(image).stem
    digits = re.fullmatch(r"(?:.*_)?(\d+)", stem, re.ASCII)
    return int(digits[1]) if digits else Path(image).name
