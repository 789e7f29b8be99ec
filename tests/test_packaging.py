"""The package that is built from the checkout: what it holds, what it must not hold, and that it can be imported.

`kernels`, `export` and `benchmarks` lie beside `xfm_fast` and are installed inside it; they must not become packages of
their own. The links of their names in `xfm_fast` serve a checkout alone: builds do without them.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("benchmarks", "export", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DATA_SUFFIXES = {".json", ".yaml", ".html", ".css", ".js", ".pyi"}


@dataclass
class Builds:
    source: Path  # the tree that was built, a copy of the checkout
    sdist: Path
    wheel: Path
    wheel_from_sdist: Path
    wheel_without_links: Path
    unpacked: Path  # the wheel's content


def _build(kind: str, tree: Path, into: Path) -> Path:
    into.mkdir(parents=True)
    code = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, f"build_{kind}", str(into)],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (
        f"build_{kind} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    pytest.importorskip("setuptools", minversion="77.0.3")
    base = tmp_path_factory.mktemp("packaging")
    source = base / "source"
    source.mkdir()
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
    ):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("xfm_fast", *LINKED):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    # A test in the tree shows that tests are left out.
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").touch()

    sdist = _build("sdist", source, base / "sdist")
    wheel = _build("wheel", source, base / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(base / "unpacked-sdist", filter="data")
    (tree,) = (base / "unpacked-sdist").iterdir()
    wheel_from_sdist = _build("wheel", tree, base / "wheel-from-sdist")
    wheel_without_links = _build(
        "wheel", _without_links(source, base / "no-links"), base / "wheel-without-links"
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(base / "unpacked")
    return Builds(source, sdist, wheel, wheel_from_sdist, wheel_without_links, base / "unpacked")


def _without_links(source: Path, tree: Path) -> Path:
    """The tree as an unpacked ZIP has it: each link is a text file that holds the link's target."""
    shutil.copytree(
        source, tree, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    for name in LINKED:
        (tree / "xfm_fast" / name).unlink()
        (tree / "xfm_fast" / name).write_text(f"../{name}")
    return tree


def _contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist() if not entry.is_dir()}


def _payload(tree: Path) -> Iterator[str]:
    for folder, _, files in os.walk(tree / "xfm_fast", followlinks=True):
        if Path(folder).name in (
            "micro",
            "results",
        ):  # pytest-benchmark's and measured rows: for a checkout
            continue
        for name in files:
            if name == "py.typed" or Path(name).suffix in DATA_SUFFIXES | {".py"}:
                yield (Path(folder) / name).relative_to(tree).as_posix()


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_lead_to_the_folder_beside_the_package(name: str) -> None:
    link = ROOT / "xfm_fast" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


def test_wheel_holds_every_module_and_data_file(builds: Builds) -> None:
    held = {name for name in _contents(builds.wheel) if ".dist-info/" not in name}
    expected = set(_payload(builds.source))
    assert held == expected, (
        f"missing (no __init__.py beside it?): {expected - held}; unexpected: {held - expected}"
    )
    assert {"xfm_fast/kernels/ops.py", "xfm_fast/export.py", "xfm_fast/py.typed"} <= held


def test_sdist_holds_plain_files_only(builds: Builds) -> None:
    with tarfile.open(builds.sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if not (member.isfile() or member.isdir())]
    roots = {member.name.split("/")[1] for member in members if "/" in member.name}
    assert roots >= {"xfm_fast", *LINKED, "pyproject.toml", "setup.py", "LICENSE", "CHANGELOG.md"}
    assert "tests" not in roots


@pytest.mark.parametrize("other", ["wheel_from_sdist", "wheel_without_links"])
def test_every_way_builds_the_same_wheel(builds: Builds, other: str) -> None:
    direct, detour = _contents(builds.wheel), _contents(getattr(builds, other))
    assert sorted(direct) == sorted(detour)
    assert {name for name in direct if direct[name] != detour[name]} == set()


def test_wheel_imports_away_from_the_checkout(builds: Builds, tmp_path: Path) -> None:
    code = """
import importlib, importlib.metadata, pathlib, sys
unpacked = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(unpacked))
for name in ("xfm_fast", "xfm_fast.kernels.ops", "xfm_fast.export", "xfm_fast.benchmarks.record"):
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(unpacked), (name, module.__file__)
    assert module.__doc__, name
import xfm_fast
print(xfm_fast.__version__, importlib.metadata.version("xfm-fast"))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(builds.unpacked)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [_version(), _version()]


@pytest.mark.parametrize("name", LINKED)
def test_no_folder_of_the_checkout_hides_a_distribution(name: str, tmp_path: Path) -> None:
    """A program that starts in the checkout has its root first on the path."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    code = f"import sys; sys.path.append(sys.argv[1]); import {name}; print({name}.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).parent.parent in (tmp_path, *map(Path, site.getsitepackages()))


def test_libraries_are_imported_from_the_root_of_the_checkout() -> None:
    names = (
        "sentence_transformers",
        "transformers.models.bert.modeling_bert",
        "timm",
        "xfm_fast.kernels.ops",
    )
    code = "".join(f"import {name}\n" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_command_line_entry_point(builds: Builds) -> None:
    entry_points = ConfigParser()
    (path,) = builds.unpacked.glob("*.dist-info/entry_points.txt")
    entry_points.read(path, encoding="utf-8")
    assert dict(entry_points["console_scripts"]) == {"xfm-fast": "xfm_fast.cli:main"}
    assert {"xfm_fast/cli.py", "xfm_fast/cli/__init__.py"} & set(_contents(builds.wheel))


def test_requirements_are_ranges() -> None:
    extras = [item for items in PROJECT["optional-dependencies"].values() for item in items]
    for requirement in PROJECT["dependencies"] + extras:
        specification = requirement.split(";")[0]
        assert not re.search(r"==|@|\+|<", specification), f"{requirement} must be a lower bound"


def _version() -> str:
    text = (ROOT / "xfm_fast" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    return version


def test_no_licence_of_a_requirement_binds() -> None:
    """Nothing that an installation brings is under a licence that its users would have to take over."""
    for requirement in PROJECT["dependencies"]:
        try:
            found: Any = metadata.metadata(re.split(r"[\s\[;<>=!~(@]", requirement)[0])
        except metadata.PackageNotFoundError:
            continue
        licences = [found.get("License-Expression") or "", *(found.get_all("Classifier") or [])]
        assert not [
            each for each in licences if re.search(r"\bA?GPL|GNU (Affero )?General Public", each)
        ], requirement


def test_no_message_installs_a_package_that_is_not_ours() -> None:
    """The name is free on package indexes: whoever takes it would be installed."""
    folders = (*LINKED, "docs", "examples", "xfm_fast")
    files = [
        path
        for folder in folders
        for form in ("py", "md")
        for path in (ROOT / folder).rglob(f"*.{form}")
    ]
    for path in (*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert not re.search(r"pip install ['\"]?xfm-fast", path.read_text(encoding="utf-8")), path
