"""The site of the pages is built without a warning, and its links lead to what is in it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_links_out_of_the_pages_become_text() -> None:
    spec = importlib.util.spec_from_file_location("outside", ROOT / "docs/outside.py")
    assert spec is not None
    assert spec.loader is not None
    outside = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outside)
    page = (
        "<!-- bench:begin x.json -->\n[loop](../xfm_fast/training/loop.py), [README](../README.md), [data](data.md)\n"
    )
    assert outside.on_page_markdown(page) == "loop, [README](index.md), [data](data.md)\n"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")], cwd=ROOT,
        capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    built = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= built
    assert "The probability that each text describes the image" in (tmp_path / "site/api/index.html").read_text()
