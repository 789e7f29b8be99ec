"""Fine-tuning files: JSON arrays in the official formats, read whole and checked element by element."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xfm_fast.data.files import Paths, check_plain, find_files, unreadable
from xfm_fast.errors import DataError

_SHOWN = 3


Text = Annotated[str, Field(min_length=1)]
Identity = int | Text
Texts = Annotated[
    tuple[Text, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
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
    answer: Texts | None = None
    dataset: str = "vqa"

    @property
    def weighted_answers(self) -> list[tuple[str, float]]:
        """Each distinct answer with its weight in the loss.

        The weight is its share of the answers, so that a single one, as GQA has, weighs 1; Visual Genome's weigh 0.5.
        """
        answers = self.answer or ()
        if self.dataset == "vg":
            return [(answer, 0.5) for answer in answers[:1]]
        return [(answer, times / len(answers)) for answer, times in Counter(answers).items()]


class GroundingRecord(Annotation):
    """A phrase and the part of the image that it means.

    The official files have no boxes (the refer toolkit looks them up by `ref_id`); `bbox` is what it gives.
    """

    image: Text
    text: Text
    ref_id: Identity
    bbox: tuple[float, float, float, float] | None = Field(None, description="x, y, w, h in pixels")


class CaptioningRecord(Annotation):
    """An image, with a caption where it is for training."""

    image: Text
    caption: Text | None = None
    image_id: Identity | None = None


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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    if not data.strip():
        raise DataError(f"{path} is empty; download or write it again")
    check_plain(path, data[:16])
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None
    except json.JSONDecodeError as error:
        expected = "one JSON array of objects, [{...}, {...}]"
        if error.msg == "Extra data" and data.lstrip().startswith(b"{"):
            expected += ", not one object a line as in pretraining"
        raise DataError(f"{path}:{error.lineno}:{error.colno}: {error.msg}; expected {expected}") from None
    except RecursionError:
        raise DataError(
            f"{path} is nested too deeply; expected one JSON array of objects, [{{...}}, {{...}}]"
        ) from None
    if not isinstance(content, list):
        raise DataError(
            f"{path} holds a JSON {type(content).__name__}; expected one array of objects, [{{...}}, {{...}}]"
        )
    if not content:
        raise DataError(f"{path} holds no elements; give at least one")
    return content


def parse_annotation(element: Any, kind: type[Record]) -> Record:
    """One element as a record.

    Raises:
        DataError: says which fields are missing or wrong, and what they hold.
    """
    if not isinstance(element, dict):
        raise DataError(f"is a {type(element).__name__}; expected an object with {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate(element)
    except ValidationError as error:
        wrong = []
        for problem in error.errors():
            given = repr(problem["input"])
            held = f"{given[:60] + '...' if len(given) > 60 else given} ({problem['msg'].lower()})"
            wrong.append(f"{str(problem['loc'][0])!r} is {'missing' if problem['type'] == 'missing' else held}")
        raise DataError("; ".join(dict.fromkeys(wrong))) from None
