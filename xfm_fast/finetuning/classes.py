"""The classes of a classification: their names, the truth of records, and a result of logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from xfm_fast.data.annotations import Annotation, AnnotationRows, label_names
from xfm_fast.errors import DataError
from xfm_fast.finetuning.evaluation import Row

_SHOWN = 3


def check_columns(columns: Iterable[str], kind: type[Annotation]) -> None:
    """Raise `ValueError`, for a recipe to report, unless `columns` names fields of a kind of records alone."""
    if unknown := [field for field in columns if field not in kind.model_fields]:
        raise ValueError(f"columns: {unknown[0]} is no field; known here: {', '.join(kind.model_fields)}")


def class_names(given: Sequence[str], rows: Iterable[AnnotationRows[Any]]) -> tuple[str, ...]:
    """The classes in their order: those that are given, or else those of the rows to train on, sorted by name.

    Raises:
        DataError: there are none, or one only.
    """
    names = tuple(given or label_names(rows))
    if len(names) < 2:
        raise DataError(f"there is one class only, {', '.join(names)!r}; a classifier needs at least two")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"the class {twice[0]!r} is named twice in task.labels; name it once")
    return names


def class_number(label: str | None, names: Sequence[str]) -> int:
    """The place of a label among the classes.

    Raises:
        DataError: there is no label, or it is none of them.
    """
    if label is None:
        raise DataError("'label' is missing; training needs the class")
    if label not in names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise DataError(f"label {label!r} is none of the {len(names)} classes ({shown}); correct it")
    return names.index(label)


def have_truth(records: Sequence[Any], names: Sequence[str] | None) -> bool:
    """True where every record to evaluate on has a label, false where none has.

    Args:
        records: with `label`.
        names: the classes, or None where labels are numbers.

    Raises:
        DataError: a label is none of the classes, or some records have one and others not.
    """
    labels = [record.label for record in records]
    known = set(labels) if names is None else {None, *names}
    if foreign := Counter(label for label in labels if label not in known):
        label, times = foreign.most_common(1)[0]
        raise DataError(
            f"{foreign.total()} of {len(labels)} records to evaluate on have a class that training does not know, such "
            f"as {label!r} ({times}); correct them, or name all classes by task.labels=[...]"
        )
    absent = labels.count(None)
    if 0 < absent < len(labels):
        raise DataError(
            f"{absent} of {len(labels)} records to evaluate on have no label; give all of them one, or none to predict"
        )
    return absent == 0


def class_rows(logits: Tensor, names: Sequence[str], most: int = 5) -> list[Row]:
    """A result for each row of logits `[B, classes]`: `answer`, and the `probabilities` of the likeliest classes."""
    shares, places = logits.double().softmax(-1).topk(min(most, len(names)))
    rows = []
    for values, numbers in zip(shares.tolist(), places.tolist(), strict=True):
        ranked = {names[number]: value for number, value in zip(numbers, values, strict=True)}
        rows.append({"answer": names[numbers[0]], "probabilities": ranked})
    return rows
