"""The documentation site builds without a warning, with every page in its navigation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    variables = {"NO_MKDOCS_2_WARNING": "1", "REPOSITORY": "https://example.org/xfm"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")], cwd=ROOT,
        capture_output=True, text=True, check=False, env=os.environ | variables, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    built = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= built
    home = (tmp_path / "site/index.html").read_text()
    assert all(part in home for part in ("pip install", "https://example.org/xfm", "slate"))
    assert (
        "The probability that each text describes the image"
        in (tmp_path / "site/api/index.html").read_text()
    )
