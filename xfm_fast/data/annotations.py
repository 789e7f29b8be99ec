"""The elements of fine-tuning files: records of each task, judged one by one as they are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from xfm_fast.data.files import Paths, file_of, find_files, read_json, unreadable
from xfm_fast.errors import DataError

_SHOWN, _LONGEST = 3, 60
_LEAST_HELD_OUT, _MOST_HELD_OUT = 10, 1000
ARRAY = "one JSON array of objects, [{...}, {...}]"
# Boxes of COCO reach past the edge by rounding.
_EDGE = 1.0


def _no_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "it holds no text")
    return text


def _answered(value: Any) -> Any:
    """Answers without the empty ones, which people gave now and then."""
    if not isinstance(value, (list, tuple)):
        return value
    answers = [each for each in map(answer_text, value) if not isinstance(each, str) or each.strip()]
    if value and not answers:
        raise PydanticCustomError("blank", "all answers are empty")
    return answers


def answer_text(value: Any) -> Any:
    """One of ten answers, which stands in an object of its own or alone."""
    return value.get("answer") if isinstance(value, dict) else value


Text = Annotated[str, AfterValidator(_no_blank)]
Identity = int | Text
Texts = Annotated[
    tuple[Text, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
]
Answers = Annotated[Texts, BeforeValidator(_answered)]
# What ten people said, to score by: an empty answer is one of ten.
PeopleAnswers = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: list(map(answer_text, value)) if isinstance(value, list) else value),
]
Label = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value), AfterValidator(_no_blank)
]


class Annotation(BaseModel):
    """One element of a fine-tuning file. Fields that are not named here are not read."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)


class RetrievalRecord(Annotation):
    """An image and one of its captions, for training: captions of one image share its `image_id`."""

    image: Text = Field(description="path below the image folder")
    caption: Text
    image_id: Identity


class RetrievalTestRecord(Annotation):
    """An image and all captions that describe it, for evaluation."""

    image: Text
    caption: Texts


class NLVR2Record(Annotation):
    """A statement about two images."""

    images: Annotated[tuple[Text, ...], Field(min_length=2, max_length=2)]
    sentence: Text
    label: bool


class VQARecord(Annotation):
    """A question about an image, with its answers where they are known."""

    image: Text
    question: Text
    question_id: Identity
    answer: Answers | None = Field(default=None, description="what training takes; empty answers are left out")
    dataset: str = "vqa"
    answers: PeopleAnswers | None = Field(default=None, description="the ten people's, to score by")
    question_type: str | None = None
    answer_type: str | None = None

    @property
    def weighted_answers(self) -> list[tuple[str, float]]:
        """Each distinct answer with its weight in the loss.

        The weight is its share of the answers, so that a single one, as GQA has, weighs 1; Visual Genome's weigh 0.5.
        """
        answers = self.answer or ()
        if self.dataset == "vg":
            return [(answer, 0.5) for answer in answers[:1]]
        return [(answer, times / len(answers)) for answer, times in Counter(answers).items()]

    @property
    def scored(self) -> dict[str, Any] | None:
        """The annotation that `tasks.vqa.vqa_accuracy` scores by; None where people's answers are not known."""
        if self.answers is None:
            return None
        kinds = {"question_type": self.question_type, "answer_type": self.answer_type}
        return {
            "question_id": self.question_id,
            "answers": [{"answer": answer} for answer in self.answers],
            **{name: kind for name, kind in kinds.items() if kind is not None},
        }


class GroundingRecord(Annotation):
    """A phrase and the part of the image that it means.

    The official files have no boxes; `grounding_rows` looks them up by `ref_id`.
    """

    image: Text
    text: Text
    ref_id: Identity
    bbox: tuple[float, float, float, float] | None = Field(default=None, description="x, y, w, h in pixels")
    split: str | None = Field(default=None, description="val, testA, ...")
    width: int | None = Field(default=None, gt=0, description="of the image, in pixels")
    height: int | None = Field(default=None, gt=0, description="of the image, in pixels")

    @model_validator(mode="after")
    def _box_is_inside(self) -> GroundingRecord:
        if self.bbox is not None:
            x, y, w, h = self.bbox
            if not all(map(math.isfinite, self.bbox)) or w <= 0 or h <= 0:
                raise PydanticCustomError("box", "has no area; expected x, y, w, h in pixels")
            right, below = self.width or math.inf, self.height or math.inf
            if min(x, y) < -_EDGE or x + w > right + _EDGE or y + h > below + _EDGE:
                size = f" {self.width}x{self.height}" if self.width and self.height else ""
                raise PydanticCustomError("box", "is not inside the{size} image", {"size": size})
        return self


class CaptioningRecord(Annotation):
    """An image, with a caption where it is for training."""

    image: Text
    caption: Text | None = None
    image_id: Identity | None = None

    @property
    def identity(self) -> int | str:
        """`image_id`, or the digits after the last `_` of the file name, or else the file name."""
        return self.image_id if self.image_id is not None else identity_of(self.image)


class CaptioningTestRecord(Annotation):
    """An image, with all captions that are known of it."""

    image: Text
    caption: Texts | None = None
    image_id: Identity | None = None

    @property
    def identity(self) -> int | str:
        """`image_id`, or the digits after the last `_` of the file name, or else the file name."""
        return self.image_id if self.image_id is not None else identity_of(self.image)


class TextRecord(Annotation):
    """A text or a pair of texts, with its class where it is known."""

    text: Text
    text2: Text | None = None
    label: Label | None = None
    index: int | None = Field(default=None, description="the number that a benchmark's result file gives it")


class TextScoreRecord(Annotation):
    """A text or a pair of texts, with a number to predict where it is known."""

    text: Text
    text2: Text | None = None
    label: Annotated[float, Field(allow_inf_nan=False)] | None = None
    index: int | None = None


class ImageLabelRecord(Annotation):
    """An image, with its class where it is known."""

    image: Text
    label: Label | None = None


Record = TypeVar("Record", bound=Annotation)


def read_annotations(paths: Paths, kind: type[Record]) -> list[Record]:
    """The elements of all files, one after another.

    Raises:
        DataError: a file is no JSON array, or elements of it lack fields: names the first few.
    """
    records = []
    for path in find_files(paths):
        wrong = []
        for number, element in enumerate(read_array(path)):
            try:
                records.append(parse_annotation(element, kind))
            except DataError as error:
                wrong.append(f"element {number}: {error}")
        if wrong:
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise DataError(f"{path}, counting from 0: {'; '.join(wrong[:_SHOWN])}{more}")
    return records


def read_array(path: str | os.PathLike[str]) -> Sequence[Any]:
    """The elements of one file, unchecked.

    Raises:
        DataError: it cannot be read, or is no JSON array, with line and column where it stops being one.
    """
    path = Path(path)
    return array_of(path, read_json(path, ARRAY, lines=", not one object a line as in pretraining"))


def array_of(path: Path, content: Any, known: str = "one array of objects, [{...}, {...}]") -> list[Any]:
    """The content of a file, which must be an array that is not empty; messages say what is `known`."""
    if not isinstance(content, list):
        raise DataError(f"{path} holds a JSON {type(content).__name__}; expected {known}")
    if not content:
        raise DataError(f"{path} holds no elements; give at least one")
    return content


def parse_annotation(element: Any, kind: type[Record]) -> Record:
    """One element as a record.

    Raises:
        DataError: says which fields are missing or wrong, and what they hold.
    """
    if isinstance(element, DataError):
        raise DataError(str(element))
    if not isinstance(element, dict):
        raise DataError(f"is a {type(element).__name__}; expected an object with {', '.join(kind.model_fields)}")
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
                wrong.append(f"{str(problem['loc'][0])!r} is {'missing' if problem['type'] == 'missing' else held}")
        raise DataError("; ".join(dict.fromkeys(wrong))) from None


class Elements(NamedTuple):
    """What a file holds, before any of it is judged.

    Attributes:
        name: the path.
        values: mappings of fields; a `DataError` stands for an element that is none.
        labels: what messages call each element; None numbers them from 0.
        notes: what was left out while reading, for a user to know.
        others: more files that the values come from.
    """

    name: str
    values: Sequence[Any]
    labels: Sequence[int | str] | None = None
    notes: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()


class AnnotationRows(Generic[Record]):
    """The elements of a fine-tuning file as `Rows` of records, each of which is judged when it is read.

    Args:
        path: what messages call the file.
        elements: mappings of fields; a `DataError` stands for one that is none.
        kind: of the records.
        labels: what messages call each element; by default it is numbered from 0.
        notes: what was left out while reading, for a user to know.
        others: more files that the elements come from.

    Raises:
        DataError: a file cannot be found.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        elements: Sequence[Any],
        kind: type[Record],
        *,
        labels: Sequence[int | str] | None = None,
        notes: Sequence[str] = (),
        others: Sequence[Path] = (),
    ) -> None:
        self.name, self.elements, self.kind, self.notes = os.fspath(path), elements, kind, tuple(notes)
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
        return json.dumps(self.elements[row], default=str, ensure_ascii=False).encode("utf-8", "replace")

    def of_images(self, images: Collection[str], *, others: bool = False) -> AnnotationRows[Record]:
        """The rows about some images, or all other rows."""
        rows = [row for row in range(len(self)) if (_image_of(self.elements[row]) in images) != others]
        found = copy(self)
        found.elements, found._labels = [self.elements[row] for row in rows], [self.label(row) for row in rows]
        return found

    def read(self, row: int) -> Record:
        """The record of a row.

        Raises:
            DataError: fields are missing or wrong.
        """
        return parse_annotation(self.elements[row], self.kind)

    def records(self) -> Iterator[Record]:
        """All records in order, for files of which each element must be good.

        Raises:
            DataError: an element is broken: names the file and the element.
        """
        for row in range(len(self)):
            try:
                yield self.read(row)
            except DataError as error:
                raise DataError(
                    f"{self.name}, {_place(self.label(row))}: {error} (a metric needs every element of its split: mend "
                    "it, or take it out)"
                ) from None


def _place(label: int | str) -> str:
    return f"line {label}" if isinstance(label, int) else label


def as_rows(elements: Iterable[Elements], kind: type[Record]) -> list[AnnotationRows[Record]]:
    """The rows of several files as records of one kind."""
    return [
        AnnotationRows(each.name, each.values, kind, labels=each.labels, notes=each.notes, others=each.others)
        for each in elements
    ]


def label_names(rows: Iterable[AnnotationRows[Any]]) -> list[str]:
    """The classes of all rows, sorted by name, as ImageFolder numbers them.

    Raises:
        DataError: no row has a label.
    """
    found = {
        str(label)
        for each in rows
        for element in each.elements
        if isinstance(element, dict) and (label := element.get("label")) not in (None, "")
    }
    if not found:
        raise DataError("no row has a label; name the column that holds the classes")
    return sorted(found)


def read_answer_list(path: str | os.PathLike[str]) -> list[str]:
    """The answers that a VQA model ranks: a JSON array of strings.

    Raises:
        DataError: it is no such array, an answer is empty, or is there twice.
    """
    path = Path(path)
    answers = array_of(path, read_json(path, "one JSON array of strings"), "one array of strings")
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(f"{path}: answer {number} is {answer!r}; expected a text that is not empty")
    if twice := [answer for answer, times in Counter(answers).items() if times > 1]:
        raise DataError(f"{path}: {_first(twice)} stand there more than once; leave one of each")
    return answers


class Named(NamedTuple):
    """How many things were found, and the first three of them."""

    number: int
    first: tuple[str, ...]


def _image_of(element: Any) -> Any:
    return element.get("image") if isinstance(element, dict) else None


def image_names(items: Iterable[Any]) -> Iterator[str]:
    """The images of rows (unread), of records, or of paths, in order; an image comes as often as it is named."""
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
    """See that each image exists; none is opened.

    Args:
        items: rows, records or paths (see `image_names`).
        root: folder that their names are below.

    Raises:
        DataError: images are missing: how many, and the first three.
    """
    names = dict.fromkeys(image_names(items))
    absent = [name for name in names if not os.path.isfile(file_of(os.path.join(root, name)))]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(names)} images do not exist below {os.fspath(root)}: {_first(absent)}; check the "
            "image folder (data.images)"
        )


def held_out(items: Iterable[Any], share: float, root: str | os.PathLike[str]) -> set[str]:
    """A share of the images that exist: those whose names have the smallest BLAKE2 digests.

    At most 1,000 are held out, and at least 10, or a quarter of fewer than 40. Names are relative to `root`: the choice
    depends neither on the place of the data nor on their order.

    Args:
        items: rows, records or paths (see `image_names`).
        share: of the images.
        root: folder that their names are below.

    Raises:
        DataError: fewer than 2 images exist.
    """
    names = {name for name in image_names(items) if os.path.isfile(file_of(os.path.join(root, name)))}
    if len(names) < 2:
        raise DataError(
            f"{len(names)} images exist below {os.fspath(root)}, too few to hold some out; name the split val "
            "(data.splits.val=<file>), or check the image folder (data.images)"
        )

    def digest(name: str) -> tuple[bytes, str]:
        relative = os.path.relpath(os.path.join(root, name), root)
        return hashlib.blake2b(relative.encode(), digest_size=8).digest(), name

    number = max(1, int(share * len(names)), min(_LEAST_HELD_OUT, len(names) // 4))
    return {*sorted(names, key=digest)[: min(_MOST_HELD_OUT, number)]}


def overlap(a: Iterable[Any], b: Iterable[Any]) -> Named:
    """The images that two splits share, in the order of the second (see `image_names`)."""
    return _shared(map(os.path.normpath, image_names(a)), map(os.path.normpath, image_names(b)))


def overlap_of_texts(a: Iterable[Any], b: Iterable[Any]) -> Named:
    """The texts, or pairs of texts, that two splits share; rows (unread) or records."""
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
                yield " / ".join(str(row[name]) for name in ("text", "text2") if row.get(name) is not None)


def unlisted_answers(records: Iterable[VQARecord], answers: Iterable[str]) -> Named:
    """The most frequent answers of questions that a list of answers lacks, so that ranking cannot find them."""
    listed = set(answers)
    best = (max(Counter(record.answer).items(), key=lambda item: item[1])[0] for record in records if record.answer)
    lacking = [answer for answer in best if answer not in listed]
    return Named(len(lacking), tuple(dict.fromkeys(lacking))[:_SHOWN])


def identity_of(image: str) -> int | str:
    """The digits after the last `_` of a file name (COCO_val2014_000000000042.jpg is 42), or else the name."""
    stem = Path(image).stem
    digits = re.fullmatch(r"(?:.*_)?(\d+)", stem, re.ASCII)
    return int(digits[1]) if digits else Path(image).name


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
