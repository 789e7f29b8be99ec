"""The command line as a user meets it: help, mistakes and completion of every command; processes of its own."""

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cyclopts import App
from PIL import Image
from torch import Tensor

import xfm_fast
from tests.cli.runner import invoke
from xfm_fast.cli.app import app, main
from xfm_fast.cli.console import progress
from xfm_fast.cli.kernels import AuditOptions
from xfm_fast.kernels.cpu import selection, waiting
from xfm_fast.kernels.cpu.races import races
from xfm_fast.training.distributed import Processes
from xfm_fast.training.metrics import RunLog
from xfm_fast.training.recipe_fields import LogRecipe

ROOT = Path(__file__).resolve().parents[2]
TINY = ["bench", "--preset", "tiny", "--quick", "--threads", "1"]


def _run(*arguments: str, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "140"}
    return subprocess.run(
        [sys.executable, "-m", "xfm_fast.cli", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        preexec_fn=before,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        Image.fromarray(noise.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"a picture called {name} that shows nothing but coloured noise\n")
    (folder / "broken.jpg").write_bytes((folder / "one.jpg").read_bytes()[:500])
    (folder / "broken.txt").write_text("a file that was cut\n")
    return folder


def test_help_does_not_load_torch() -> None:
    done = _run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("bench", "info", "convert"))
    code = "import sys, xfm_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_version() -> None:
    assert _run("--version").stdout.strip() == f"xfm-fast {xfm_fast.__version__}"


def test_bench_from_end_to_end(photos: Path, tmp_path: Path) -> None:
    done = _run(*TINY, "--data", str(photos), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    assert "Skipped (1)" in done.stdout
    assert re.search(r"broken\.jpg .*truncated", done.stdout)
    assert "random weights" in done.stdout
    latest = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert latest["data"]["photos"] == 3
    assert latest["command"][:2] == ["xfm-fast", "bench"]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_full_disk_prints_the_table_and_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    done = _run(*TINY, "--data", str(photos), "--out", str(tmp_path / "out"), before=small_files_only)
    assert done.returncode == 2
    assert "images/s" in done.stdout
    assert done.stderr.startswith("xfm-fast: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--preset", "huge"], 'Choose from: "base", "tiny"'),
        ([*TINY, "--dtype", "fp8"], 'Choose from: "auto", "fp32", "bf16"'),
        ([*TINY, "--data", "absent"], "does not exist"),
        ([*TINY, "--checkpoint", "absent.pth"], "does not exist"),
        ([*TINY, "--tokenizer", "absent"], "absent"),
        (["convert", "absent.th", "out"], "does not exist"),
        (["convert", "absent.th", "out", "--to", "onnx"], 'Choose from: "official", "xfm"'),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(arguments)
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_info_as_tables_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (waiting.POLICY, waiting.SPINS):
        monkeypatch.delenv(name, raising=False)
    done = _run("info")
    assert done.returncode == 0, done.stderr
    assert "briefly (GOMP_SPINCOUNT=1000)" in " ".join(done.stdout.split())
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
    assert f"linear fp32: {selection._selections['linear', torch.float32].reason}" in done.stdout
    selection._read.cache_clear()
    monkeypatch.setattr(selection, "_selections", {})
    monkeypatch.setenv(selection.CHOICES, str(out))
    paths = json.loads(invoke(["info", "--json"]).stdout)["paths"]
    names = {"fp32": "float32", "bf16": "bfloat16"}
    assert {(path["operation"], names[path["dtype"]]): path["chosen"] for path in paths} == kept
    assert all(selection.CHOICES in path["reason"] for path in paths)
    refused = invoke(["tune", "--cpu", "--out", out])
    assert refused.exit_code == 2
    assert "unset it first" in refused.stderr
    monkeypatch.delenv(selection.CHOICES)
    for name in (tmp_path, tmp_path / "absent" / "choices.json"):
        refused = invoke(["tune", "--cpu", "--out", name])
        assert refused.exit_code == 2
        assert not refused.stdout
        assert f"{name} cannot be written" in refused.stderr


def test_convert_reports(
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
    assert done.exit_code == 0
    assert done.stderr == ""
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
    for wrong in ("--no-such-option", "--helpp", "--no-such-option=1"):
        done = invoke([*path, wrong])
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("xfm-fast: ")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["inof"], '"info"'),
        (["exprot", "onnx"], '"export"'),
        (["data", "chek"], '"check"'),
        (["info", "--jsom"], "--json"),
        (["data", "shapes", "out", "--trian", "3"], "--train"),
        (["tune", "--dtype", "fp61"], '"fp16"'),
    ],
)
def test_the_nearest_name_is_said(arguments: list[str], nearest: str) -> None:
    done = invoke(arguments)
    assert done.exit_code == 2
    assert f"Did you mean {nearest}?" in done.stderr


def _parsed(arguments: list[str]) -> Any:
    return app.parse_args(arguments)[1].arguments["options"]


def test_tuples_take_commas_and_may_be_repeated() -> None:
    options = _parsed(["audit", "--arch", "90, 120", "--kernel", "a,b", "--kernel", "c"])
    assert options == AuditOptions(arch=(90, 120), kernel=("a", "b", "c"))
    assert _parsed(["audit", "--all", "--kernel", ""]) == AuditOptions(all=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "--jobs", "0"], 'Invalid value "0" for --jobs: use at least 1.'),
        (["audit", "--jobs", "2.5"], 'Invalid value for --jobs: unable to convert "2.5" into int.'),
        (["audit", "--arch", "90,ninety"], 'unable to convert "ninety" into int'),
        (["data", "check", "a", "--task", "text", "--tolerate-bad", "2"], 'Invalid value "2.0" for --tolerate-bad'),
        (["data", "check", "a"], "--task requires an argument"),
        (["data", "shapes"], "OUT requires an argument"),
        (["convert", "a", "b", "c"], 'Unexpected "c".'),
        (["convert", "a", "b", "--preset"], "--preset requires an argument"),
        (["convert", "a", "b", "--preset", "tiny", "--preset", "base"], "--preset specified multiple times"),
    ],
)
def test_values_that_are_wrong(arguments: list[str], message: str) -> None:
    done = invoke(arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.rstrip().endswith("--help")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["bench", "--threads", 10**8], "use at most 4096"),
        (["bench", "--seed", 10**30], "use at most 9223372036854775807"),
        (["bench", "coco", "--k", 99999999999], "use at most 1000000"),
        (["bench", "scenario", "rerank", "--image-size", 10**18], "use at most 16384"),
        (["bench", "scenario", "rerank", "--p99-ms", "nan"], "use more than 0"),
        (["bench", "scenario", "rerank", "--p99-ms", "inf"], "use a finite number"),
        (["convert", "a", "b", "--image-size", 10**18], "use at most 16384"),
        (["convert", "a", "b", "--image-size", -5], "use at least 1"),
        (["export", "onnx", "--out", "a", "--preset", "tiny", "--image-size", 10**18], "use at most 16384"),
        (["pretrain", "pretrain_base_4m", f"seed={10**18}0"], "use less than 9223372036854775808"),
        (["pretrain", "pretrain_base_4m", "workers=100000"], "use at most 1024"),
        (["pretrain", "pretrain_base_4m", "model.vocab_size=4000000000"], "vocab_size=4000000000"),
        (["pretrain", "pretrain_base_4m", "model.vocab_size=2000000000"], "this machine has"),
        (["pretrain", "pretrain_base_4m", f"steps={'[' * 5000}"], "nested"),
        (["pretrain", "x" * 300], "choose a shorter name"),
    ],
)
def test_what_is_out_of_bounds_comes_with_advice(arguments: list[Any], advice: str) -> None:
    done = invoke(arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert advice in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _circle(folder: Path) -> str:
    (folder / "circle").symlink_to("circle")
    return str(folder / "circle")


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "{}", "out"],
        ["convert", "{}", "out", "--config", "{}"],
        ["export", "verify", "{}"],
        ["export", "onnx", "--out", "o", "--checkpoint", "{}"],
        ["bench", "report", "{}"],
        ["bench", "compare", "{}", "{}"],
        ["data", "check", "{}", "--task", "text"],
        ["data", "convert", "{}", "{}/a"],
        ["pretrain", "{}"],
        ["finetune", "{}"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
@pytest.mark.parametrize("name", ["long", "circle", "surrogate", "device", "newline"])
def test_every_command_speaks_of_names_in_sentences(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"long": "x" * 300, "surrogate": "a\udcff", "device": "/dev/zero", "newline": "a\nb"}
    given = _circle(tmp_path) if name == "circle" else names[name]
    done = invoke([word.format(given) for word in arguments])
    assert done.exit_code == 2, done.output[-2000:]
    assert done.stderr.startswith("xfm-fast: ")
    assert "internal error" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x"),
            2,
            "x cannot be used (File name too long); choose a shorter",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "check its permissions"),
        (OSError("odd"), 2, "the system refused (odd); XFM_DEBUG=1"),
        (MemoryError(), 2, "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "memory"),
        (RecursionError("deep"), 2, "nested too deeply"),
        (KeyError("a\nb"), 70, "internal error (please report), KeyError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_no_error_is_a_traceback_unless_asked_for(
    error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("xfm_fast.benchmarks.machine.describe", fail)
    done = invoke(["info"])
    assert done.exit_code == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    monkeypatch.setenv("XFM_DEBUG", "1")
    with pytest.raises(type(error)):
        invoke(["info"])


@pytest.mark.parametrize(
    ("shell", "environment", "codes", "message"),
    [
        ("info", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, (0,), ""),
        ("--help", {"PYTHONIOENCODING": "ascii"}, (0,), ""),
        ("bench report gr\u00f6\u00dfe", {"PYTHONIOENCODING": "ascii"}, (2,), "cannot be read"),
        ("--help >&-", {}, (2,), "standard output is closed"),
        ("--help > /dev/full", {}, (2,), "standard output cannot be written (No space left on device)"),
        ("inof 2>&-", {}, (2,), ""),
        ("inof 2>/dev/full", {}, (1, 2, 120), ""),
        ("pretrain pretrain_tiny_shapes", {"WORLD_SIZE": "2"}, (2,), "RANK is not set; start them with torchrun"),
        ("pretrain pretrain_tiny_shapes", {"WORLD_SIZE": "x"}, (2,), "WORLD_SIZE is 'x'"),
    ],
    ids=str,
)
def test_terminals_that_are_not_as_they_should_be(
    tmp_path: Path, shell: str, environment: dict[str, str], codes: tuple[int, ...], message: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m xfm_fast {shell}"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True,
        check=False, timeout=170,
    )  # fmt: skip
    assert done.returncode in codes, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_take_turns_and_the_first_process_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that evaluates has two; neither redraws itself over the other."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with (
        progress("evaluating") as told,
        RunLog(tmp_path, LogRecipe(), Processes(), steps=9, start=0, title="run") as log,
    ):
        log.advance(3)
        told(2, 2)
        drawn = terminal.getvalue()
        assert "3/9" in drawn
        assert "100%" in drawn
        time.sleep(0.3)
        assert terminal.getvalue() == drawn
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stderr", other := Terminal())
    with progress("evaluating") as told:
        told(2, 2)
    assert other.getvalue() == ""


@pytest.mark.parametrize("group", [[], ["data"], ["export"]])
def test_a_group_without_a_command_shows_what_there_is(group: list[str]) -> None:
    done = invoke(group)
    assert done.exit_code == 2
    assert "Usage: xfm-fast" in done.stdout


def test_interruption_has_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xfm_fast.benchmarks.machine.describe", interrupt)
    assert invoke(["info"]).exit_code == 130


def test_a_reader_that_has_enough() -> None:
    command = f"{sys.executable} -m xfm_fast --help | true; exit ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1)
        assert done.stderr == ""


def test_both_modules_are_the_command() -> None:
    for module in ("xfm_fast", "xfm_fast.cli"):
        command = [sys.executable, "-m", module, "inof"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert 'Did you mean "info"?' in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script completes commands, options and choices; with --output no file of the shell's own is touched."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    script = tmp_path / "completion"
    done = invoke(["--install-completion", "--shell", shell, "--output", script])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "home").exists()
    text = script.read_text()
    assert all(word in text for word in ("reproduce", "claims", "tolerate-bad", "webdataset"))
    if shell == "bash":
        typed = "COMP_WORDS=(xfm-fast data convert --to ''); COMP_CWORD=4"
        ask = f"source {script}; {typed}; _xfm_fast; echo ${{COMPREPLY[*]}}"
        completed = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert completed.stdout.split() == ["webdataset", "lines"]


def test_completion_of_the_shell_is_loaded_when_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("XDG_DATA_HOME", "BASH_COMPLETION_USER_DIR"):
        monkeypatch.delenv(variable, raising=False)
    done = invoke(["--install-completion", "--shell", "bash"])
    assert done.exit_code == 0, done.output
    script = Path(done.stdout.removeprefix("saved: ").split(";")[0])
    assert script.is_relative_to(tmp_path)
    assert str(script) in (tmp_path / ".bashrc").read_text()
    (tmp_path / "file").touch()
    refused = invoke(["--install-completion", "--shell", "bash", "--output", tmp_path / "file" / "script"])
    assert refused.exit_code == 2
    assert "name a file with --output" in refused.stderr


@pytest.mark.parametrize(
    ("command", "asked"),
    [("search", "1"), ("bench", "1"), ("bench train-step", None), ("pretrain", None), ("finetune", None)],
)
def test_pytorch_is_asked_for_huge_pages_unless_the_whole_heap_has_them(
    command: str, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xfm_fast.cli.app.run", lambda arguments: 0)
    monkeypatch.setattr(sys, "argv", ["xfm-fast", *command.split()])
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == asked
