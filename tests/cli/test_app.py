"""The command line as a user meets it: help, mistakes and completion of every command; former names."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

import xfm_fast
from tests.cli.runner import invoke
from xfm_fast.cli.app import app
from xfm_fast.kernels.cpu import selection
from xfm_fast.kernels.cpu.selection import races

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "140"}
    command = [sys.executable, "-m", "xfm_fast.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False
    )  # fmt: skip


def test_help_does_not_load_torch() -> None:
    done = _run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("bench", "info", "convert"))
    code = "import sys, xfm_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert invoke(["--version"]).stdout.strip() == f"xfm-fast {xfm_fast.__version__}"


@pytest.mark.slow
def test_choices_for_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_selections", {})
    out = tmp_path / "choices.json"
    done = invoke(["tune", "--cpu", "--out", out])
    assert done.exit_code == 0, done.stderr
    assert f"{selection.CHOICES}={out}" in done.stdout
    kept = {
        (each["operation"], each["dtype"]): each["chosen"]
        for each in json.loads(out.read_text())["choices"]
    }
    assert {operation for operation, _ in kept} == set(races())
    selection._read.cache_clear()
    monkeypatch.setattr(selection, "_selections", {})
    monkeypatch.setenv(selection.CHOICES, str(out))
    paths = json.loads(invoke(["info", "--json"]).stdout)["paths"]
    table = invoke(["info"]).stdout
    for word in (
        "bf16",
        "AVX2" if "x86" in os.uname().machine else "NEON",
        "onnxruntime",
        "flash-attn",
        "linear",
    ):
        assert word in table
    names = {"fp32": "float32", "bf16": "bfloat16"}
    assert {(path["operation"], names[path["dtype"]]): path["chosen"] for path in paths} == kept
    assert invoke(["tune", "--cpu", "--out", out]).exit_code == 2
    monkeypatch.delenv(selection.CHOICES)
    for name in (tmp_path, tmp_path / "absent" / "choices.json"):
        refused = invoke(["tune", "--cpu", "--out", name])
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert str(name) in refused.stderr


def _commands(
    group: App = app, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], App]]:
    """Every command and group with its words, completion among them."""
    yield path, group
    for name in group:
        if name not in ("--help", "-h", "--version"):
            yield from _commands(group[name], (*path, name))


COMMANDS = dict(_commands())
each_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


@each_command
def test_help_fits_a_terminal_and_breaks_no_word(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = invoke([*path, "--help"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    shown = set(done.stdout.split())
    if COMMANDS[path].default_command is None:
        return
    for argument in COMMANDS[path].assemble_argument_collection(parse_docstring=True):
        if not argument.children:
            assert argument.parameter.help, f"{argument.name} has no help"
            assert set(argument.parameter.help.split()) <= shown
            assert argument.name in shown or not argument.field_info.is_keyword


@each_command
def test_wrong_usage_is_one_line(path: tuple[str, ...]) -> None:
    for wrong in ("--no-such-option", "--helpp"):
        done = invoke([*path, wrong])
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("xfm-fast: ")
        assert len(done.stderr.splitlines()) == 1


def test_commands_and_options_are_few() -> None:
    """The options of a shared group count once."""
    commands = {
        path: command for path, command in COMMANDS.items() if command.default_command and path
    }
    options = {
        (argument.name, argument.parameter.help)
        for command in commands.values()
        for argument in command.assemble_argument_collection(parse_docstring=True)
        if argument.name.startswith("--") and not argument.children
    }
    assert len(commands) <= 29, "raise it, and say in the commit why one more is worth it"
    assert len(options) <= 124, "raise it, and say in the commit why one more is worth it"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["inof"], '"info"'),
        (["convert", "absent.th", "out", "--to", "official"], "--to"),
        (["convert", "absent.th", "out"], "absent.th"),
        (["convert", "a", "b", "c"], '"c"'),
        (["convert", "a", "b", "--image-size"], "--image-size"),
        (["convert", "a", "b", "--image-size", 10**18], "16384"),
        (["data", "shapes", "out", "--train", "2.5"], '"2.5"'),
        (["audit", "--arch", "90,ninety"], '"ninety"'),
        (["data", "check", "a", "--task", "text", "--tolerate-bad", "2"], "--tolerate-bad"),
        (["data", "shapes"], "OUT"),
        (["pretrain", "pretrain_base_4m", f"seed={10**18}0"], "9223372036854775808"),
        (["pretrain", "pretrain_base_4m", f"steps={'[' * 5000}"], "nested"),
        (["pretrain", "x" * 300], "name"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[Any], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "x cannot be used"),
        (MemoryError(), 2, "memory"),
        (RecursionError("deep"), 2, "nested"),
        (KeyError("a\nb"), 70, "KeyError"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_are_one_line_with_a_code(
    error: BaseException, code: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("xfm_fast.benchmarks.machine.describe", fail)
    done = invoke(["info"])
    assert done.exit_code == code
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == (code != 130)
    monkeypatch.setenv("XFM_DEBUG", "1")
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            invoke(["info"])


@pytest.mark.parametrize(
    ("shell", "codes", "part"),
    [
        ("--help >&-", (2,), "standard output is closed"),
        ("--help > /dev/full", (2,), "standard output cannot be written"),
        ("inof 2>/dev/full", (1, 2, 120), ""),
        ("--help | true; exit ${PIPESTATUS[0]}", (0, 1), ""),
    ],
    ids=str,
)
def test_terminals_that_are_not_as_they_should_be(
    tmp_path: Path, shell: str, codes: tuple[int, ...], part: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m xfm_fast {shell}"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False, timeout=170,
    )  # fmt: skip
    assert done.returncode in codes, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("group", [[], ["data"]])
def test_a_group_without_a_command_shows_its_commands(group: list[str]) -> None:
    done = invoke(group)
    assert done.exit_code == 2
    assert "Usage: xfm-fast" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_completion_is_written(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script completes commands, options and choices; with --output no file of the shell's own is touched."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    script = tmp_path / "completion"
    done = invoke(["--install-completion", "--shell", shell, "--output", script])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "home").exists()
    assert all(word in script.read_text() for word in ("tolerate-bad", "image-key"))
    if shell == "bash":
        typed = "COMP_WORDS=(xfm-fast index --device ''); COMP_CWORD=3"
        ask = f"source {script}; {typed}; _xfm_fast; echo ${{COMPREPLY[*]}}"
        completed = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert completed.stdout.split() == ["auto", "cpu", "cuda"]
