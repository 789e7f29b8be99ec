"""The tree of commands, and the one place where a command line becomes a call, a message and an exit code.

The parser is derived by cyclopts from the configs that the library functions take: frozen dataclasses (or pydantic
models) whose annotations are the types and choices and whose docstring is the help. Of the two kept libraries that do
so, tyro wants the functions of all commands, and so imports what they import, PyTorch included, before it answers
`--help`; it names no nearest command for a misspelt one, and a list of positionals before a last one swallows that when
an option follows. cyclopts imports a command when it is asked for, completes in four shells, groups the help, and
answers what is misspelt with the nearest name. What it lacks is `read_values`.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    Parameter,
    UnknownCommandError,
    UnusedCliTokensError,
    default_name_transform,
)

from xfm_fast import __version__
from xfm_fast.cli import console, data, finetune, kernels, options, search, serve, train, trial
from xfm_fast.cli.options import DATA, MEASURE, SEARCH, SERVE, TRAIN
from xfm_fast.errors import StorageError, UnavailableError, XFMError
from xfm_fast.kernels.cpu.waiting import wait_briefly

if TYPE_CHECKING:
    from cyclopts import ArgumentCollection

BROKEN_PIPE = 1
USAGE_ERROR = 2
BUG = 70
INTERRUPTED = 130


def read_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Split the values of tuples at commas, refuse a fraction for a whole number, and have bounds checked."""
    # cyclopts lets it check bounds such as `Annotated[int, Ge(1)]`, once it is imported.
    import pydantic  # noqa: F401

    for argument in arguments:
        if options.mentions(argument.hint, tuple):
            argument.tokens[:] = [
                token.evolve(value=part.strip()) if token.keyword else token
                for token in argument.tokens
                for part in (token.value.split(",") if token.keyword else [token.value])
                if part.strip()
            ]
        if options.mentions(argument.hint, int) and not options.mentions(argument.hint, float):
            for token in argument.tokens:
                # cyclopts would take 2.5 for 2.
                if "." in token.value:
                    raise CoercionError(argument=argument, token=token, target_type=int)


app = App(
    name="xfm-fast",
    help="X-FM, exact and fast: measure it, train it, export it, see what this machine offers.",
    version_flags=(),
    config=read_values,
    default_parameter=Parameter(negative=(), show_default=options.shown),
    group_parameters=options.OPTIONS,
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)

# These groups bring much with them and are imported when one of their commands is asked for, hence their help is here.
app.command(
    "xfm_fast.cli.bench:app",
    name="bench",
    group=MEASURE,
    help="""Measure this machine: fast against official, in one process, on real photographs.

    Without a sub-command the whole suite runs. Results go to a JSON file and a self-contained HTML page.""",
)
app.command(
    "xfm_fast.cli.export:app",
    name="export",
    group=SERVE,
    help="""Export to ONNX and engines, verified against the model.

    Exit code 1: the export differs from the model; 3: no GPU ran the engines, and the graphs behind them agree; 4:
    nothing could be compared.""",
)
app.command(serve.serve, group=SERVE)
app.command(trial.trial, name="try", group=MEASURE)
for command in (kernels.info, kernels.audit, kernels.tune):
    app.command(command, group=MEASURE)
for command in (train.pretrain, finetune.finetune, finetune.evaluate, finetune.predict, train.gradflow):
    app.command(command, group=TRAIN)
for command in (search.index, search.search):
    app.command(command, group=SEARCH)
app.command(train.reproduce)
app.command(data.data)
app.command(data.convert, group=DATA)


@app.command(name="--version")
def version() -> None:
    """Print the version and exit."""
    print(f"xfm-fast {__version__}")


@app.command(name="--install-completion")
def install_completion(
    *, shell: Literal["bash", "zsh", "fish", "powershell"] | None = None, output: Path | None = None
) -> None:
    """Complete commands, options and choices in your shell from now on.

    Args:
        shell: The shell. [that which runs this command]
        output: File of the script, which is then yours to load. [loaded when the shell starts]
    """
    from cyclopts.completion import ShellDetectionError

    try:
        script = app.install_completion(shell=shell, output=output, add_to_startup=output is None)
    except ShellDetectionError as error:
        raise UnavailableError("the shell cannot be told; name it with --shell") from error
    except OSError as error:
        raise StorageError(f"completion cannot be installed: {error}; name a file with --output") from error
    print(f"saved: {script}; it is in force in a new shell" if output is None else f"saved: {script}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs a command line, by default that of the process, and exits with its code."""
    if arguments is None:
        arguments = sys.argv[1:]
        if arguments[:1] not in (["pretrain"], ["finetune"]) and arguments[:2] != ["bench", "train-step"]:
            # PyTorch reads it at its first allocation: large tensors then lie in huge pages where Linux leaves that to
            # programs. Products of matrices that no cache holds take a tenth less time, which is that of finding
            # addresses. Commands that train ask for a whole heap of them, which takes less memory.
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if arguments[:1] not in (["bench"], ["try"]):
            # What is measured is measured as PyTorch is.
            wait_briefly(os.environ)
    _make_writable()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(run(arguments))
    # One of several processes, whose threads may wait for the interpreter while it is taken down: it ends at once, when
    # all is written and the modules have had their say.
    code = 1
    try:
        code = run(arguments)
    except Exception:  # with XFM_DEBUG
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command line.

    Errors that a user can mend are one message on standard error and code 2, and what is a bug is one and code 70. With
    `XFM_DEBUG=1` in the environment what is not an error of ours keeps its traceback.
    """
    try:
        if sys.stdout is None:
            console.note("standard output is closed, and results would be lost; send it to a file or to /dev/null")
            return USAGE_ERROR
        command, bound, _ = app.parse_args(arguments)
        code: Any = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except CycloptsError as error:
        console.note(_usage(error))
        return USAGE_ERROR
    except XFMError as error:
        console.note(str(error))
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has enough, as in `xfm-fast info | head`; what is left to flush at exit goes nowhere.
        _drop_output()
        return BROKEN_PIPE
    except Exception as error:
        if os.environ.get("XFM_DEBUG", "0") not in ("", "0"):
            raise
        return _told(error)
    if getattr(command, "__name__", "") == "help_print" and not {"--help", "-h"} & set(arguments):
        # A group without a command, which shows what there is.
        return USAGE_ERROR
    return code or 0


def _make_writable() -> None:
    """Have every character printed, by its number where the terminal does not know it, and messages go somewhere."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, it stays for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# What to do about a refusal of the operating system.
_REMEDIES = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file in it",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: name the file that is meant",
    errno.ENOSPC: "free space or choose another folder",
    errno.EDQUOT: "free space or choose another folder",
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENOMEM: "use less memory or a larger machine",
}


def _told(error: Exception) -> int:
    """Say in a sentence what is no error of ours; returns the exit code."""
    said = " ".join(str(error).split())[:300]
    if isinstance(error, RuntimeError) and said.startswith("Symlink loop"):
        # As Python up to 3.12 puts it.
        error = OSError(errno.ELOOP, os.strerror(errno.ELOOP), said.partition("'")[2].rstrip("'"))
    if isinstance(error, OSError):
        # Our own writers raise errors of ours, so this is what was printed.
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
            _drop_output()
            console.note(f"standard output cannot be written ({error.strerror}); results were lost: free space")
            return USAGE_ERROR
        name = f"{error.filename} cannot be used" if error.filename is not None else "the system refused"
        remedy = _REMEDIES.get(error.errno or 0, "XFM_DEBUG=1 shows where")
        console.note(f"{name} ({error.strerror or said}); {remedy}")
        return USAGE_ERROR
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said:
        console.note(f"memory is used up ({said or 'MemoryError'}); use smaller sizes or a larger machine")
        return USAGE_ERROR
    if isinstance(error, RecursionError):
        console.note("the input is nested too deeply; flatten it")
        return USAGE_ERROR
    console.note(
        f"this is a fault of xfm-fast, {type(error).__name__}: {said}; please report it with what XFM_DEBUG=1 shows"
    )
    return BUG


def _usage(error: CycloptsError) -> str:
    """The fault of a command line, in one line, with the nearest name where one is near."""
    from pydantic import ValidationError

    from xfm_fast.documents import advice

    error.verbose = False
    text = str(error)
    if isinstance(error, UnknownCommandError):
        # It ends with the commands that there are.
        return " ".join(text.split())
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        word = error.unused_tokens[0]
        near = get_close_matches(word, [*error.app] if error.app else [], n=1)
        text = f'Unexpected "{word}".' + (f' Did you mean "{near[0]}"?' if near else "")
    elif isinstance(error.__cause__, ValidationError):
        # The argument is an option, or `*`, a whole model, whose field it then is.
        wrong, option = error.__cause__.errors()[0], error.argument.name if error.argument else "*"
        if option == "*":
            option = f"--{default_name_transform(str(wrong['loc'][0]))}"
        text = f'Invalid value "{wrong["input"]}" for {option}: {advice(wrong)}.'
    chain = " ".join(["xfm-fast", *(error.command_chain or ())])
    return f"{' '.join(text.split())} See {chain} --help"
