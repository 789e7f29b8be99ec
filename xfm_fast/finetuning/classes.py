"""Class names, labels and result rows of classification tasks."""

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
    """Raise `ValueError`, for the recipe, if `columns` has keys that are not fields of `kind`."""
    if unknown := [field for field in columns if field not in kind.model_fields]:
        raise ValueError(f"columns: {unknown[0]} is no field; known here: {', '.join(kind.model_fields)}")


def class_names(given: Sequence[str], rows: Iterable[AnnotationRows[Any]]) -> tuple[str, ...]:
    """Ordered class names: `given`, else the sorted labels of the training rows; fewer than two raise `DataError`."""
    names = tuple(given or label_names(rows))
    if len(names) < 2:
        raise DataError(f"there is one class only, {', '.join(names)!r}; a classifier needs at least two")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"the class {twice[0]!r} is named twice in task.labels; name it once")
    return names


def class_number(label: str | None, names: Sequence[str]) -> int:
    """Index of a label; a missing or unknown label raises `DataError`."""
    if label is None:
        raise DataError("'label' is missing; training needs the class")
    if label not in names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise DataError(f"label {label!r} is none of the {len(names)} classes ({shown}); correct it")
    return names.index(label)


def have_truth(records: Sequence[Any], names: Sequence[str] | None) -> bool:
    """True if all records have a label, false if none has; mixed or unknown labels raise `DataError`."""
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
    """Rows of `answer` and the `most` largest `probabilities` from logits `[B, classes]`."""
    shares, places = logits.double().softmax(-1).topk(min(most, len(names)))
    rows = []
    for values, numbers in zip(shares.tolist(), places.tolist(), strict=True):
        ranked = {names[number]: value for number, value in zip(numbers, values, strict=True)}
        rows.append({"answer": names[numbers[0]], "probabilities": ranked})
    return rows
