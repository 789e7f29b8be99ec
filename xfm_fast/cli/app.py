"""The command tree, and the entry point that maps a command line to a call, a message and an exit code.

cyclopts derives the parser from the configs of the library functions: frozen dataclasses or
pydantic models, with annotations as types and choices and the docstring as help. It imports a
command only when it is used, so `--help` runs without PyTorch (tyro imports the functions of all
commands), completes in four shells, groups the help, and suggests the nearest name for a typo.
`read_values` adds what it lacks.
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
from xfm_fast.cli import bench, console, data, finetune, kernels, model, options, search, train
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
    """Split tuple values at commas, refuse fractions for integers, and enable bounds."""
    # cyclopts checks bounds such as `Annotated[int, Ge(1)]` if pydantic is imported.
    import pydantic  # noqa: F401

    for argument in arguments:
        if options.mentions(argument.hint, tuple):
            tokens = []
            for token in argument.tokens:
                if token.keyword:
                    items = filter(None, map(str.strip, token.value.split(",")))
                    tokens += [token.evolve(value=item) for item in items]
                elif token.value.strip():
                    tokens.append(token)
            argument.tokens[:] = tokens
        if options.mentions(argument.hint, int) and not options.mentions(argument.hint, float):
            for token in argument.tokens:
                # cyclopts would read 2.5 as 2.
                if "." in token.value:
                    raise CoercionError(argument=argument, token=token, target_type=int)


app = App(
    name="xfm-fast",
    help="X-FM, exact and fast: benchmark, train, fine-tune, export and serve it.",
    version_flags=(),
    config=read_values,
    default_parameter=Parameter(negative=(), show_default=options.shown),
    group_parameters=options.OPTIONS,
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)

app.command(bench.app)
# This group is imported lazily, so its help is here.
app.command(
    "xfm_fast.cli.export:app",
    name="export",
    group=SERVE,
    help="""Export a model to ONNX, TensorRT or native code, and verify the graphs against the model.

    An exported run answers `xfm-fast predict` as the run does. Exit code 1: the export differs from the model; 3: no
    GPU ran the engines, but the graphs agree; 4: not compared.""",
)
app.command(model.serve, group=SERVE)
app.command(bench.try_model, name="try", group=MEASURE)
for command in (kernels.info, kernels.audit, kernels.tune):
    app.command(command, group=MEASURE)
for command in (
    train.pretrain,
    train.reproduce,
    finetune.finetune,
    finetune.evaluate,
    finetune.predict,
):
    app.command(command, group=TRAIN)
for command in (search.index, search.search):
    app.command(command, group=SEARCH)
app.command(data.embed, group=SEARCH)
app.command(data.data)
app.command(model.convert, group=DATA)


@app.command(name="--version")
def version() -> None:
    """Print the version and exit."""
    print(f"xfm-fast {__version__}")


@app.command(name="--install-completion")
def install_completion(
    *, shell: Literal["bash", "zsh", "fish", "powershell"] | None = None, output: Path | None = None
) -> None:
    """Install shell completion of commands, options and choices.

    Args:
        shell: Shell to complete in. [detected]
        output: File that receives the script, to load yourself. [loaded at shell startup]
    """
    from cyclopts.completion import ShellDetectionError

    try:
        script = app.install_completion(shell=shell, output=output, add_to_startup=output is None)
    except ShellDetectionError as error:
        raise UnavailableError("the shell cannot be detected; name it with --shell") from error
    except OSError as error:
        raise StorageError(
            f"completion cannot be installed: {error}; name a file with --output"
        ) from error
    print(f"saved: {script}" + ("; new shells use it" if output is None else ""))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, by default the process's, and exit with its code."""
    if arguments is None:
        arguments = sys.argv[1:]
        trains = arguments[:1] in (["pretrain"], ["finetune"])
        if not trains and arguments[:2] != ["bench", "train-step"]:
            # PyTorch reads this at its first allocation and puts large tensors in huge pages, if
            # Linux leaves that to programs: GEMMs larger than the cache take 10% less time.
            # Training commands put the whole heap in huge pages, which takes less memory.
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if arguments[:1] not in (["bench"], ["try"]):
            # Benchmarks measure PyTorch as it waits by default.
            wait_briefly(os.environ)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, it stays for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal cannot encode is escaped.
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(run(arguments))
    # With several processes, threads may deadlock at interpreter shutdown: exit right after the
    # exit handlers and a flush.
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
    """Run a command line and return its exit code.

    User errors print one message on standard error and return 2; a bug prints one and returns 70,
    or with `XFM_DEBUG=1` in the environment raises with its traceback.
    """
    try:
        if sys.stdout is None:
            console.note("standard output is closed; redirect it to a file or /dev/null")
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
        # The reader closed the pipe, as in `xfm-fast info | head`; discard the rest.
        _drop_output()
        return BROKEN_PIPE
    except Exception as error:
        if os.environ.get("XFM_DEBUG", "0") not in ("", "0"):
            raise
        return _report_exception(error)
    if getattr(command, "__name__", "") == "help_print" and not {"--help", "-h"} & set(arguments):
        # A group without a command printed its help.
        return USAGE_ERROR
    return code or 0


def _drop_output() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Remedies for operating system errors.
_REMEDIES = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file in it",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links form a circle: name the target",
    errno.ENOSPC: "free space or choose another folder",
    errno.EDQUOT: "free space or choose another folder",
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENOMEM: "use less memory or a larger machine",
}


def _report_exception(error: Exception) -> int:
    """Report an exception that is not an XFMError in one line; returns the exit code."""
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, RuntimeError) and reason.startswith("Symlink loop"):
        # The wording of Python up to 3.12.
        error = OSError(errno.ELOOP, os.strerror(errno.ELOOP), reason.partition("'")[2].rstrip("'"))
    if isinstance(error, OSError):
        # Our writers raise XFMError, so this came from printing.
        if error.filename is None and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
            errno.EBADF,
        ):
            _drop_output()
            console.note(
                f"standard output cannot be written ({error.strerror}); results were lost: free space"
            )
            return USAGE_ERROR
        name = "the system refused"
        if error.filename is not None:
            name = f"{error.filename} cannot be used"
        remedy = _REMEDIES.get(error.errno or 0, "XFM_DEBUG=1 shows where")
        console.note(f"{name} ({error.strerror or reason}); {remedy}")
        return USAGE_ERROR
    on_gpu = type(error).__name__ == "OutOfMemoryError"
    if on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in reason:
        console.note(
            f"out of memory ({reason or 'MemoryError'}); use smaller sizes or a larger machine"
        )
        return USAGE_ERROR
    if isinstance(error, RecursionError):
        console.note("the input is nested too deeply; flatten it")
        return USAGE_ERROR
    console.note(
        f"internal error (please report), {type(error).__name__}: {reason}; XFM_DEBUG=1 shows the traceback"
    )
    return BUG


def _usage(error: CycloptsError) -> str:
    """Format a usage error in one line, with the nearest name for a typo."""
    from pydantic import ValidationError

    from xfm_fast.io import advice

    error.verbose = False
    text = str(error)
    if isinstance(error, UnknownCommandError):
        # This message lists the commands at its end.
        return " ".join(text.split())
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        word = error.unused_tokens[0]
        text = f'Unexpected "{word}".'
        if near := get_close_matches(word, [*error.app] if error.app else [], n=1):
            text += f' Did you mean "{near[0]}"?'
    elif isinstance(error.__cause__, ValidationError):
        # The argument is an option, or `*`, a whole model; then the field is the option.
        wrong, option = error.__cause__.errors()[0], error.argument.name if error.argument else "*"
        if option == "*":
            option = f"--{default_name_transform(str(wrong['loc'][0]))}"
        text = f'Invalid value "{wrong["input"]}" for {option}: {advice(wrong)}.'
    chain = " ".join(["xfm-fast", *(error.command_chain or ())])
    return f"{' '.join(text.split())} See {chain} --help"
