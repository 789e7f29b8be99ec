"""Files: untrusted JSON and YAML within limits, atomic writes, and locks.

Reading takes seconds and a few times the file's size of memory, and raises only `OSError` or
`ValueError`, which the caller converts into an error of `xfm_fast.errors`. Writing raises
`StorageError`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import BufferedRandom, BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import psutil
import yaml

from xfm_fast.errors import StorageError
from xfm_fast.kernels.files import is_stream, open_at_once, open_stream

try:
    import fcntl
except ImportError:  # not every system has it
    fcntl = None

T = TypeVar("T")

MOST_JSON_BYTES = 64 << 20
# The parser is slow, and no configuration of a person is larger.
MOST_YAML_BYTES = 1 << 20
MOST_DEPTH = 64
_LAST = "manifest.json"
# Aliases in YAML repeat their anchors: a few lines can expand to more than any memory holds.
_MOST_VALUES = 1 << 24


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; raises `OSError` (also for pipes and devices) or `ValueError`."""
    with open_data(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content


def open_data(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file that other processes may have written or replaced.

    Raises `OSError` for pipes and devices, without waiting for their other end, and for a name with a
    NUL.
    """
    return open(require_file(path), "rb", opener=_open_regular)


def open_to_append(path: str | os.PathLike[str]) -> BufferedRandom:
    """Open a regular file to append and read, or create it; raises `OSError` as `open_data` does."""
    if os.path.exists(path):
        require_file(path)
    return open(path, "a+b", opener=_open_regular)


def require_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of a regular file; raises `OSError` for pipes and devices, whose reading may never end."""
    path = Path(path)
    try:
        _check_regular(path.stat(), path)
    except ValueError:
        raise OSError(errno.EINVAL, "its name holds a NUL", str(path)) from None
    return path


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the items of an iterator, each computed by a thread while the previous one is used."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a folder or a device, not a file", str(path))


def _open_regular(path: str, flags: int) -> int:
    handle = open_at_once(path, flags)
    try:
        # Another file may have taken the name since the check.
        _check_regular(os.fstat(handle), path)
    except OSError:
        os.close(handle)
        raise
    return handle


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a UTF-8 JSON file of at most 64 MiB; raises `OSError`, or `ValueError` as `parse_json` does."""
    return parse_json(read_bytes(path, MOST_JSON_BYTES))


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises `ValueError` for text that is not JSON (a `json.JSONDecodeError`) or not UTF-8, is nested
    more than 64 deep, or holds an integer of more than 64 bits or half of a surrogate pair.
    """
    try:
        value = json.loads(_decode(text))
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    _check(value)
    return value


def parse_yaml(text: str | bytes) -> Any:
    """Parse a YAML text of at most 1 MiB into plain values.

    Raises `yaml.YAMLError` for text that is not YAML, and `ValueError` as `parse_json` does, or for
    aliases that are cyclic or expand to too many values.
    """
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"it has more than {MOST_YAML_BYTES:,} bytes")
    try:
        value = yaml.safe_load(_decode(text))
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    except (yaml.YAMLError, ValueError):
        raise
    except Exception as error:
        # A tag that does not fit its text, for example `!!timestamp x`, raises any exception.
        raise ValueError(f"a tag does not fit its value ({type(error).__name__})") from None
    _check(value)
    return value


def check_text(value: Any, text: str | bytes) -> None:
    """Raise `ValueError` if the parsed value contains half of a surrogate pair, which UTF-8 lacks."""
    # Only an escape can add a surrogate, and such escapes are rare.
    if isinstance(text, bytes):
        escaped = b"\\ud" in text or b"\\uD" in text
    else:
        escaped = "\\ud" in text or "\\uD" in text
    if escaped:
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError(_surrogate_message(error)) from None


def is_plain_name(name: str) -> bool:
    """Return whether a file name has no path separators and is valid on every operating system."""
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    return len(os.fsencode(name)) <= 255


def advice(problem: Mapping[str, Any]) -> str:
    """Rephrase one of pydantic's `ValidationError.errors()` as a remedy; messages of our validators stay."""
    error = problem["type"]
    if error in _ADVICE:
        return _ADVICE[error].format(**problem.get("ctx", {}))
    for prefix, sentence in _ADVICE_BY_TYPE.items():
        if error.startswith(prefix):
            return sentence
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
    "extra_forbidden": "is unknown; remove it",
    "too_short": "give at least {min_length}",
    "too_long": "give at most {max_length}",
    "int_from_float": "use an integer",
    "model_type": "give names with values",
    "none_required": "leave it out",
}
_ADVICE_BY_TYPE = {
    "int_": "use an integer",
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


def _decode(text: str | bytes) -> str:
    try:
        return text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None


def _check(value: Any) -> None:
    """Raise `ValueError` for nesting, integers, strings or numbers of values beyond the limits."""
    count, pending = 0, [(value, 1)]
    while pending:
        value, depth = pending.pop()
        count += 1
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(_surrogate_message(error)) from None
        elif isinstance(value, int) and value.bit_length() > 64:
            raise ValueError("it contains an integer of more than 64 bits")
        elif isinstance(value, (dict, list, tuple, set)):
            items = [*value, *value.values()] if isinstance(value, dict) else list(value)
            count += len(items)
            if depth > MOST_DEPTH:
                raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
            pending += [(item, depth + 1) for item in items]
        if count > _MOST_VALUES:
            raise ValueError(f"its aliases expand to more than {_MOST_VALUES:,} values")


def _surrogate_message(error: UnicodeEncodeError) -> str:
    return f"it contains half of a surrogate pair, \\u{ord(error.object[error.start]):04x}"


def write_files(writers: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Write several files atomically: each appears complete or not at all.

    Every writer fills a temporary file next to its target, which is flushed to disk; renames follow
    when all have succeeded. On failure the temporary files are removed; a killed process may leave
    one, named `.<name>.<process>-<random>.tmp`. Devices and pipes are written directly. Raises
    `StorageError` with the path.
    """
    finished: dict[Path, Path] = {}
    replaced: list[str] = []
    current = Path()
    try:
        streams = {path: writer for path, writer in writers.items() if is_stream(path)}
        for current, writer in writers.items():
            if current in streams:
                continue
            temporary = current.with_name(
                f".{current.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
            )
            finished[temporary] = current
            with temporary.open("xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        for current, writer in streams.items():
            with open_stream(current) as file:
                writer(file)
        for temporary, current in finished.items():
            os.replace(temporary, current)
            replaced.append(current.name)
        for folder in {path.parent for path in finished.values()}:
            sync_folder(folder)
    except OSError as error:
        changed = "the files are unchanged"
        if replaced:
            changed = f"{', '.join(replaced)} is already replaced"
        raise StorageError(
            f"{current} could not be written ({_reason(error)}); {changed}: free space or choose another folder"
        ) from error
    finally:
        for temporary in finished:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def storing(
    path: Path | str,
    remedy: str = "free space or choose another folder",
    *,
    action: str = "written",
) -> Iterator[None]:
    """Convert an `OSError` of the block, which writes `path`, to a `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be {action} ({_reason(error)}); {remedy}") from error


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder` that takes its place when the block succeeds, and is removed otherwise.

    Of an existing folder only files of the same names are replaced; `manifest.json`, which describes the others, is
    removed before and replaced last.
    """
    target = folder.resolve()
    scratch = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with storing(folder):
            if target.is_file():
                raise StorageError(f"{folder} is a file, not a folder; choose another name")
            scratch.mkdir(parents=True)
        yield scratch
        with storing(folder):
            if not target.exists():
                scratch.rename(target)
            else:
                (target / _LAST).unlink(missing_ok=True)
                files = [path for path in scratch.rglob("*") if path.is_file()]
                for path in sorted(files, key=lambda path: path.name == _LAST):
                    replaced = target / path.relative_to(scratch)
                    replaced.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(replaced)
            sync_folder(target.parent)
    except StorageError as error:
        raise StorageError(str(error).replace(str(scratch), str(folder))) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Create a folder with its parents; failure raises `StorageError`."""
    with storing(folder, "choose another"):
        folder.mkdir(parents=True, exist_ok=True)


def write_bytes(contents: Mapping[Path, bytes | memoryview]) -> None:
    """Write contents atomically, as `write_files`."""
    writers = {}
    for path, content in contents.items():
        writers[path] = lambda file, content=content: file.write(content)
    write_files(writers)


_held: set[Path] = set()
_held_guard = threading.Lock()


@contextmanager
def hold(lock: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock file until the block or the process ends.

    The file names its holder and is deleted with the block. Processes forked inside the block do not
    inherit the lock. On file systems without locks the existence of the file is the lock; one left by
    a dead process on this machine is reused. `what` names the locked thing in the message, such as
    `the run in runs/a`. Raises `StorageError` if it is locked already or cannot be written.
    """
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder_is_new = not lock.parent.exists()
    with storing(lock, "choose another folder"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        key = lock.parent.resolve() / lock.name
        # Locks of the system belong to the process, and end when it closes any handle of the file.
        with _held_guard:
            if key in _held:
                raise _lock_error(what, holder)
            file = _acquire_lock(lock, what)
            _held.add(key)
    try:
        with suppress(OSError):
            os.truncate(file.fileno(), 0)
            file.write(json.dumps(holder).encode())
        yield
    finally:
        with suppress(OSError):
            lock.unlink(missing_ok=True)
            # Do not leave an empty folder after an error.
            if folder_is_new:
                lock.parent.rmdir()
        with _held_guard:
            _held.discard(key)
            file.close()


def _acquire_lock(lock: Path, what: str) -> FileIO:
    # A link in a folder of a stranger may name a file that is not theirs.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    while True:
        file = FileIO(os.open(lock, flags, 0o644), "r+")
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "no locks")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise _lock_error(what, holder) from None
            # A process on another machine may be alive; on this machine a dead one left the file.
            remote = holder.get("host") != socket.gethostname()
            if holder and (remote or psutil.pid_exists(holder["process"])):
                file.close()
                raise _lock_error(what, holder) from None
        try:
            # The former holder may have removed it in between.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        except FileNotFoundError:
            pass
        file.close()


def _read_holder(file: FileIO) -> dict[str, Any]:
    try:
        holder = parse_json(os.pread(file.fileno(), 1000, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("process"), int) else {}


def _lock_error(what: str, holder: Mapping[str, Any]) -> StorageError:
    who = "another"
    if holder:
        who = f"process {holder['process']} on {holder.get('host')} since {holder.get('since')}"
    return StorageError(f"{what} is in use by {who}; wait until it ends, or choose another folder")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    # Some systems cannot open a folder.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
