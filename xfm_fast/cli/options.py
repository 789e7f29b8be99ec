"""Shared options, how config fields become options, and the former names of commands and options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

from cyclopts import App, Group, Parameter

from xfm_fast.errors import InputError
from xfm_fast.loading import Weights

UNFINISHED = 75
"""Exit code of interrupted work (EX_TEMPFAIL): the same command resumes it."""

T = TypeVar("T")
S = TypeVar("S", bound=Weights)
Flat = Annotated[T, Parameter(name="*")]
"""A command parameter with its fields as options: `options: Flat[CheckOptions]`."""

Json = Annotated[bool, Parameter(name="--json", help="Print JSON instead of tables.")]
Model = Annotated[
    str | None,
    Parameter(
        name="MODEL",
        help="A run, a folder of weights, a name on the Hugging Face Hub, an official checkpoint file, or an export; "
        "the same as --model.",
    ),
]

MEASURE, TRAIN, SEARCH, DATA, SERVE = (
    Group.create_ordered(name) for name in ("Measure", "Train", "Search", "Data and checkpoints", "Export and serve")
)
"""Command groups in the help."""
OPTIONS = Group("Options")


def command_group(name: str, **settings: Any) -> App:
    """A group of commands, with the common help style."""
    return App(name=name, group_parameters=OPTIONS, version_flags=(), **settings)


def named(model: str | None, source: S) -> S:
    """The source with the positional MODEL; raises `InputError` unless there is one model."""
    if model is not None and source.model is not None:
        raise InputError(f"{model} and --model {source.model} name two models; give one")
    source = source if model is None else replace(source, model=model)
    source.check()
    return source


def mentions(hint: Any, kind: type) -> bool:
    """True if a type hint is or contains `kind`: `tuple[int, ...] | None` mentions int."""
    return hint is kind or get_origin(hint) is kind or any(mentions(part, kind) for part in get_args(hint))


def shown(default: Any) -> str | None:
    """Format a default for the help; uninformative ones are omitted."""
    if isinstance(default, bool) or default in (None, "", (), []):
        return None
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


class Renamed(NamedTuple):
    """A former name of a command, or of an option of a command and its sub-commands.

    Without `option` the words of the command become `new`, otherwise the option does; `new` of None is retired, and
    `instead` says what to use. With `--model` in the line the option becomes `with_model`, if given.
    """

    command: str
    option: str | None
    new: str | None
    instead: str = ""
    with_model: str | None = None


RENAMED: tuple[Renamed, ...] = (
    Renamed("export onnx", None, "export"),
    *(Renamed(f"export {form}", None, f"export --to {form}") for form in ("aoti", "tensorrt", "tensorrt-rtx")),
    Renamed("export", "--checkpoint", "--model"),
    Renamed("export", "--preset", "--random"),
    Renamed("convert", "--preset", "--config"),
    Renamed("export", "--level", None, "EngineRequest(level=) in Python"),
    Renamed("bench", "--checkpoint", "--model"),
    Renamed("bench", "--preset", "--random", with_model="--config"),
    Renamed("bench drop-in", "--json", "--out"),
    Renamed("bench kernels", "--json", "--out"),
    Renamed("bench report", "--gains", None, "xfm_fast.benchmarks.report.tables.gains in Python"),
    Renamed("predict", "--batch-size", None, "the fixed 32 requests per batch"),
    Renamed("predict", "--model", None, "the positional MODEL"),
    *(
        Renamed("predict", name, None, "what the run recorded")
        for name in ("--random", "--config", "--image-size", "--tokenizer")
    ),
    *(
        Renamed("data check", name, None, "the model's 224 pixels and 64 rows")
        for name in ("--image-size", "--batch-size")
    ),
    Renamed("bench report", "--html", "--out"),
    *(Renamed(name, "--png", None, "bench report FILE --out page.html") for name in ("bench report", "try")),
    Renamed("bench report", "--markdown", None, "--out FILE.md"),
    Renamed("bench scenario", None, "bench"),
    Renamed("bench kernels", "--small", "--quick"),
    Renamed("bench serve", "--rounds", None, "the fixed 5 rounds, 3 with --quick"),
    Renamed("bench serve", "--documents", None, "the fixed 16 documents"),
    Renamed("bench serve", "--soak", None, "--requests 10000, and watch xfm_process_resident_bytes of /metrics"),
    Renamed("bench", "--index", None, "the fixed number of images"),
    Renamed("bench", "--texts", None, "the fixed number of texts"),
    Renamed("bench", "--k", None, "the fixed number of candidates"),
    Renamed("bench", "--lengths", None, "captions, whose lengths are real"),
    *(Renamed(name, "--threads", None, "OMP_NUM_THREADS=N in the environment") for name in ("bench", "try")),
    *(Renamed(name, "--seed", None, "the fixed seed 0") for name in ("bench", "try")),
    *(Renamed("try", name, "--inputs") for name in ("--texts", "--images")),
    *(
        Renamed("serve", name, None, "--timeout, the limit of a whole request")
        for name in ("--read-timeout", "--drain")
    ),
    Renamed("index", "--batch-size", None, "build_index(batch_size=) in Python"),
    Renamed("serve", "--max-body-mb", None, "--memory-mb, of which a request may take a sixteenth"),
    Renamed("serve", "--max-pixels", None, "the fixed limit of 16,777,216 pixels"),
    Renamed("serve", "--max-documents", None, "the fixed limit of 256 documents"),
    Renamed("serve", "--max-characters", None, "the fixed limit of 2,000 characters"),
    Renamed("serve", "--max-connections", None, "the limits of a proxy in front"),
    Renamed("serve", "--batch-wait-ms", None, "the fixed wait of 5 ms"),
    Renamed("data check", "--list-first", None, "--json for all that a check finds"),
    Renamed("data convert", "--to", None, "a destination that ends in .jsonl for lines, or a folder for shards"),
    Renamed("data convert", "--megabytes", None, "--samples, the most samples of a shard"),
    Renamed("data convert", "--quarantine", None, "data check --json, which lists broken rows"),
    *(Renamed("data shapes", name, None, "--train, of which each has a twentieth") for name in ("--val", "--test")),
    Renamed("convert", "--to", None, "a destination that ends in .th, .pth or .safetensors, or a folder"),
    Renamed("reproduce", "--jobs", None, "taskset, since a study takes the cores that the process may use"),
    Renamed("audit", "--ratchet", None, "a copy of kernels/audit_baseline.json"),
    Renamed("audit", "--cache", None, "XDG_CACHE_HOME in the environment"),
    *(Renamed(name, "--jobs", None, "taskset, which limits the cores") for name in ("audit", "tune")),
    Renamed("tune", "--dtype", None, "bf16, the dtype that is tuned"),
    Renamed("export", "--keep-onnx", None, "EngineRequest(keep_onnx=) in Python"),
    *(
        Renamed("export", f"--{name.replace('_', '-')}", None, f"TensorRTRequest({name}=) in Python")
        for name in ("timing_cache", "version_compatible", "hardware_compatible")
    ),
    *(
        Renamed("export model-repository", option, None, "config.pbtxt of the model, which is text to edit")
        for option in ("--queue-delay", "--instances", "--most-images", "--most-captions", "--cache-mb", "--device")
    ),
    *(
        Renamed("export model-repository", f"--{name.replace('_', '-')}", None, f"RepositoryOptions({name}=) in Python")
        for name in ("prefix", "most_batch")
    ),
    Renamed("export model-repository", "--tokenizer", None, "--tokenizer of xfm-fast export"),
    Renamed("export", "--all-tokens", None, "OnnxRequest(all_tokens=True) in Python"),
    Renamed("export", "--verbose", None, "XFM_DEBUG=1 in the environment"),
    Renamed("export model-repository", "--overwrite", None, "another --out, or delete the folder"),
    Renamed("export int8", "--data", None, "--data of xfm-fast export, whose images and captions are used"),
    Renamed("export int8", "--tokenizer", None, "the tokenizer of the export"),
)
"""Names of the version before; they work for this one, with a warning."""


def modernised(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line with today's names, and a warning for every former one; raises `InputError` for a retired one."""
    line, warnings = list(arguments), []
    for each in RENAMED:
        words = each.command.split()
        if line[: len(words)] != words:
            continue
        if each.option is None:
            if each.new is None:
                raise InputError(f"{each.command} is retired; use {each.instead}")
            line[: len(words)] = (each.new or "").split()
            warnings.append(f"{each.command} is now {each.new}")
            continue
        for place, word in _options(line):
            name, equals, value = word.partition("=")
            if name != each.option:
                continue
            if each.new is None:
                raise InputError(f"{each.option} is retired; use {each.instead}")
            beside = each.with_model and any(other.partition("=")[0] == "--model" for _, other in _options(line))
            new = each.with_model if beside else each.new
            line[place] = f"{new}{equals}{value}"
            warnings.append(f"{each.option} is now {new}")
    return line, warnings


def _options(line: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Places and words of options, up to a `--`."""
    for place, word in enumerate(line):
        if word == "--":
            return
        if word.startswith("--"):
            yield place, word
