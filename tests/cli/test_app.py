"""The command line as a user meets it: help, mistakes and completion of every command; former names."""

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts import App
from torch import Tensor

import xfm_fast
from tests.cli.runner import invoke
from xfm_fast.cli.app import app, main
from xfm_fast.cli.console import named_progress, progress
from xfm_fast.cli.kernels import AuditOptions
from xfm_fast.cli.options import RENAMED, modernised
from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import selection, waiting
from xfm_fast.kernels.cpu.races import races
from xfm_fast.training.distributed import Processes
from xfm_fast.training.metrics import RunLog
from xfm_fast.training.recipe_fields import LogRecipe

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


def test_info_as_tables_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (waiting.POLICY, waiting.SPINS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("LC_ALL", "C")
    done = _run("info")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "GOMP_SPINCOUNT=1000" in " ".join(done.stdout.split())
    for word in ("processor", "AVX2" if "x86" in os.uname().machine else "NEON", "onnxruntime", "flash-attn", "linear"):
        assert word in done.stdout
    facts = json.loads(invoke(["info", "--json"]).stdout)
    assert facts.keys() == {"machine", "packages", "paths"}
    assert {path["operation"] for path in facts["paths"]} >= {"linear", "linear_gelu", "linear_residual"}
    assert all(path["chosen"] for path in facts["paths"])


def test_choices_for_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_selections", {})
    out = tmp_path / "choices.json"
    done = invoke(["tune", "--cpu", "--out", out])
    assert done.exit_code == 0, done.stderr
    assert f"{selection.CHOICES}={out}" in done.stdout
    kept = {(each["operation"], each["dtype"]): each["chosen"] for each in json.loads(out.read_text())["choices"]}
    assert {operation for operation, _ in kept} == set(races())
    selection._read.cache_clear()
    monkeypatch.setattr(selection, "_selections", {})
    monkeypatch.setenv(selection.CHOICES, str(out))
    paths = json.loads(invoke(["info", "--json"]).stdout)["paths"]
    names = {"fp32": "float32", "bf16": "bfloat16"}
    assert {(path["operation"], names[path["dtype"]]): path["chosen"] for path in paths} == kept
    assert invoke(["tune", "--cpu", "--out", out]).exit_code == 2
    monkeypatch.delenv(selection.CHOICES)
    for name in (tmp_path, tmp_path / "absent" / "choices.json"):
        refused = invoke(["tune", "--cpu", "--out", name])
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert str(name) in refused.stderr


def test_convert_there_and_back(
    load_tensors: Callable[[str], dict[str, Tensor]],
    golden: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save({"model": load_tensors("tiny_a/weights")}, tmp_path / "official.th")
    monkeypatch.chdir(tmp_path)
    done = invoke(["convert", "official.th", tmp_path / "ours", "--config", golden("tiny_a/config.json")])
    assert done.exit_code == 0, done.stderr
    assert "dead weights" in done.stdout
    assert (tmp_path / "ours" / "model.safetensors").is_file()
    back = invoke(["convert", "ours", "back.th"])
    assert back.exit_code == 0, back.stderr
    assert "wrote back.th" in back.stdout


def _commands(group: App = app, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], App]]:
    """Every command and group with its words, completion among them."""
    yield path, group
    for name in group:
        if name not in ("--help", "-h", "--version"):
            yield from _commands(group[name], (*path, name))


COMMANDS = dict(_commands())
each_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


@each_command
def test_help_fits_a_terminal_and_breaks_no_word(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
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
    commands = {path: command for path, command in COMMANDS.items() if command.default_command and path}
    options = {
        (argument.name, argument.parameter.help)
        for command in commands.values()
        for argument in command.assemble_argument_collection(parse_docstring=True)
        if argument.name.startswith("--") and not argument.children
    }
    assert len(commands) <= 36
    assert len(options) <= 190


def test_former_names_are_today_s_with_a_warning() -> None:
    line, warnings = modernised(["export", "tensorrt", "--checkpoint=a", "--out", "b", "--", "--preset"])
    assert line == ["export", "--to", "tensorrt", "--model=a", "--out", "b", "--", "--preset"]
    assert len(warnings) == 2
    line, _ = modernised(["bench", "--checkpoint", "a.th", "--preset", "base"])
    assert line == ["bench", "--model", "a.th", "--config", "base"]
    assert modernised(["search", "export", "onnx"]) == (["search", "export", "onnx"], [])
    for each in RENAMED:
        words = [*each.command.split(), *([each.option] if each.option else [])]
        if each.new is None:
            with pytest.raises(InputError, match=each.option):
                modernised(words)
            continue
        found = " ".join(modernised(words)[0]).split()
        known = next(COMMANDS[words] for n in (2, 1) if (words := tuple(found[:n])) in COMMANDS)
        names = {name for argument in known.assemble_argument_collection() for name in argument.names}
        assert {word for word in found if word.startswith("--")} <= names, each
    done = invoke(["export", "onnx", "--preset", "tiny", "--config", "x", "--out", "y"])
    assert done.exit_code == 2
    assert "export onnx is now export" in done.stderr
    assert "--preset is now --random" in done.stderr


def _parsed(arguments: list[str]) -> Any:
    return app.parse_args(arguments)[1].arguments["options"]


def test_tuples_take_commas_and_may_be_repeated() -> None:
    options = _parsed(["audit", "--arch", "90, 120", "--kernel", "a,b", "--kernel", "c"])
    assert options == AuditOptions(arch=(90, 120), kernel=("a", "b", "c"))
    assert _parsed(["audit", "--all", "--kernel", ""]) == AuditOptions(all=True)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["inof"], '"info"'),
        (["data", "chek"], '"check"'),
        (["tune", "--dtype", "fp61"], '"fp16"'),
        (["convert", "absent.th", "out"], "absent.th"),
        (["convert", "absent.th", "out", "--to", "onnx"], '"official"'),
        (["convert", "a", "b", "c"], '"c"'),
        (["convert", "a", "b", "--image-size"], "--image-size"),
        (["convert", "a", "b", "--image-size", 10**18], "16384"),
        (["audit", "--jobs", "0"], "--jobs"),
        (["audit", "--jobs", "2.5"], '"2.5"'),
        (["audit", "--arch", "90,ninety"], '"ninety"'),
        (["data", "check", "a", "--task", "text", "--tolerate-bad", "2"], "--tolerate-bad"),
        (["data", "shapes"], "OUT"),
        (["pretrain", "pretrain_base_4m", f"seed={10**18}0"], "9223372036854775808"),
        (["pretrain", "pretrain_base_4m", "model.vocab_size=2000000000"], "vocab_size=2000000000"),
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
    ("shell", "environment", "codes", "part"),
    [
        ("--help >&-", {}, (2,), "standard output is closed"),
        ("--help > /dev/full", {}, (2,), "standard output cannot be written"),
        ("inof 2>/dev/full", {}, (1, 2, 120), ""),
        ("--help | true; exit ${PIPESTATUS[0]}", {}, (0, 1), ""),
        ("pretrain pretrain_tiny_shapes", {"WORLD_SIZE": "2"}, (2,), "RANK"),
    ],
    ids=str,
)
def test_terminals_that_are_not_as_they_should_be(
    tmp_path: Path, shell: str, environment: dict[str, str], codes: tuple[int, ...], part: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m xfm_fast {shell}"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True,
        check=False, timeout=170,
    )  # fmt: skip
    assert done.returncode in codes, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_first_process_has_one_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and its evaluations share it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with named_progress() as show, RunLog(tmp_path, LogRecipe(), Processes(), steps=8, start=0, show=show) as log:
        log.write(4, {"loss/text/mlm": 0.5})
        log.advance(8)
        show("val", 2, 2)
        for part in ("text/mlm 0.5", "val", "100%"):
            assert part in terminal.getvalue()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stderr", other := Terminal())
    with progress("evaluating") as advance:
        advance(2, 2)
    assert other.getvalue() == ""


@pytest.mark.parametrize("group", [[], ["data"]])
def test_a_group_without_a_command_shows_its_commands(group: list[str]) -> None:
    done = invoke(group)
    assert done.exit_code == 2
    assert "Usage: xfm-fast" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_written(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script completes commands, options and choices; with --output no file of the shell's own is touched."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    script = tmp_path / "completion"
    done = invoke(["--install-completion", "--shell", shell, "--output", script])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "home").exists()
    assert all(word in script.read_text() for word in ("tolerate-bad", "webdataset"))
    if shell == "bash":
        typed = "COMP_WORDS=(xfm-fast data convert --to ''); COMP_CWORD=4"
        ask = f"source {script}; {typed}; _xfm_fast; echo ${{COMPREPLY[*]}}"
        completed = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert completed.stdout.split() == ["webdataset", "lines"]


def test_completion_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("XDG_DATA_HOME", "BASH_COMPLETION_USER_DIR"):
        monkeypatch.delenv(variable, raising=False)
    done = invoke(["--install-completion", "--shell", "bash"])
    assert done.exit_code == 0, done.output
    script = Path(done.stdout.removeprefix("saved: ").split(";")[0])
    assert script.is_relative_to(tmp_path)
    assert str(script) in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("command", "advice"), [("search", "1"), ("bench", "1"), ("bench train-step", None), ("finetune", None)]
)
def test_pytorch_takes_huge_pages_unless_the_whole_heap_has_them(
    command: str, advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xfm_fast.cli.app.run", lambda arguments: 0)
    monkeypatch.setattr(sys, "argv", ["xfm-fast", *command.split()])
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == advice
