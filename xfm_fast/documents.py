"""JSON and YAML that anyone may have written: of bounded size, depth and numbers, refused with a sentence or read.

Whatever stands in a file, reading it raises `OSError` or `ValueError` and nothing else, in seconds and in memory of a
few times its size. The caller, who knows what the file is for, makes an error of `xfm_fast.errors` out of either.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MOST_JSON_BYTES = 64 << 20
# The parser is slow, and no configuration of a person is larger.
MOST_YAML_BYTES = 1 << 20
MOST_DEPTH = 64
# A reference in YAML repeats what it refers to, so that a few lines can stand for more than any memory holds.
_MOST_VALUES = 1 << 24


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which might never end.
        ValueError: it is larger.
    """
    path = require_file(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def require_file(path: str | os.PathLike[str]) -> Path:
    """The path, of a regular file.

    Raises:
        OSError: it is none: reading a pipe or a device might never end.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is a folder or a device, not a file", str(path))
    return path


def read_json(path: str | os.PathLike[str], *, most: int = MOST_JSON_BYTES) -> Any:
    """The value of a JSON file in UTF-8 of at most `most` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large, or not what `parse_json` takes.
    """
    return parse_json(read_bytes(path, most))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON (then a `json.JSONDecodeError`) or no UTF-8, is nested more than 64 deep, or holds a
            number of more than 64 bits or half of a surrogate pair, which no file or tokenizer takes.
    """
    try:
        value = json.loads(_decoded(text))
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    _check(value)
    return value


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML text of at most 1 MiB; no tag makes anything but plain values.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: as for `parse_json`, or its references refer to themselves or stand for too many values.
    """
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"it has more than {MOST_YAML_BYTES:,} bytes")
    try:
        value = yaml.safe_load(_decoded(text))
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    except (yaml.YAMLError, ValueError):
        raise
    except Exception as error:
        # A tag on a text that it does not fit, such as `!!timestamp x`, raises whatever the library comes upon.
        raise ValueError(f"a tag does not fit its value ({type(error).__name__})") from None
    _check(value)
    return value


def check_text(value: Any, text: str | bytes) -> None:
    """Refuse half a surrogate pair in the value that was parsed from a JSON text: it cannot be written as UTF-8.

    Raises:
        ValueError: there is one.
    """
    # Only an escape can bring one in, and only few texts hold such an escape at all.
    if (b"\\ud" in text or b"\\uD" in text) if isinstance(text, bytes) else ("\\ud" in text or "\\uD" in text):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError(_surrogate(error)) from None


def is_plain_name(name: str) -> bool:
    """True for the name of a file in a folder, which leads nowhere else: no path, nor a name that no system takes."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(os.fsencode(name)) <= 255


def advice(problem: Mapping[str, Any]) -> str:
    """The words of a problem that pydantic found (an element of `ValidationError.errors()`), as what to write instead.

    What a validator of ours said stays as it is.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _ADVICE:
        return _ADVICE[kind].format(**context)
    for ending, said in _ADVICE_OF_KINDS.items():
        if kind.endswith(ending) or kind.startswith(ending):
            return said.format(**context)
    return str(problem["msg"]).removeprefix("Value error, ")


_ADVICE = {
    "greater_than": "use more than {gt}",
    "greater_than_equal": "use at least {ge}",
    "less_than": "use less than {lt}",
    "less_than_equal": "use at most {le}",
    "finite_number": "use a finite number",
    "predicate_failed": "use a finite number",
    "literal_error": "use {expected}",
    "missing": "is missing; add it",
    "extra_forbidden": "is not known; remove it",
    "too_short": "give at least {min_length}",
    "too_long": "give at most {max_length}",
    "int_from_float": "use a whole number, without a fraction",
    "model_type": "give names with values",
    "none_required": "leave it out",
}
_ADVICE_OF_KINDS = {
    "int_": "use a whole number",
    "float_": "use a number",
    "bool_": "use true or false",
    "string_": "use text",
    "path_": "use a path",
    "list_type": "give a list",
    "tuple_type": "give a list",
    "set_type": "give a list",
    "dict_type": "give names with values",
    "mapping_type": "give names with values",
    "dataclass_type": "give names with values",
}


def _decoded(text: str | bytes) -> str:
    try:
        return text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None


def _check(value: Any) -> None:
    count, rest = 0, [(value, 1)]
    while rest:
        value, depth = rest.pop()
        count += 1
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(_surrogate(error)) from None
        elif isinstance(value, int) and value.bit_length() > 64:
            raise ValueError("it holds a whole number of more than 64 bits")
        elif isinstance(value, (dict, list, tuple, set)):
            inside = [*value, *value.values()] if isinstance(value, dict) else list(value)
            count += len(inside)
            if depth > MOST_DEPTH:
                raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
            rest += [(each, depth + 1) for each in inside]
        if count > _MOST_VALUES:
            raise ValueError(f"its references stand for more than {_MOST_VALUES:,} values")


def _surrogate(error: UnicodeEncodeError) -> str:
    return f"it holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, which is no character"
