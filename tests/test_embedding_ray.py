"""`EmbedShard` in Ray Data: two workers, one of them killed, and a driver that is killed and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.library_models import write_embedder
from xfm_fast.embedding import embed_shard, plan
from xfm_fast.encoders import open_encoder

pytest.importorskip("ray.data")
pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parents[1]
SHARDS, ROWS = 24, 1500
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
START = "import ray\nray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)\n"


def _driver(model: Path) -> str:
    """The program of the documentation."""
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(import ray\n.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert MODEL in block
    return START + block.replace(MODEL, str(model))


def _start(tmp_path: Path, model: Path) -> subprocess.Popen[str]:
    settings = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    settings["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    return subprocess.Popen(
        [sys.executable, "-c", _driver(model)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )


def _wait(process: subprocess.Popen[str], out: Path, files: int) -> None:
    while len([*out.glob("*.parquet")]) < files:
        assert process.poll() is None, "the driver has ended"
        time.sleep(0.02)


@pytest.mark.slow
def test_every_shard_is_embedded_once_whoever_is_killed(tmp_path: Path) -> None:
    import psutil

    model = write_embedder(tmp_path / "model")
    (tmp_path / "corpus").mkdir()
    for index in range(SHARDS):
        texts = [f"a red circle above a blue square {index} {row}" for row in range(ROWS)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"corpus/{index:02}.parquet")
    out = tmp_path / "embeddings"
    process = _start(tmp_path, model)
    try:
        _wait(process, out, 4)
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "MapWorker" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        _wait(process, out, 10)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in children:
            if child.is_running():
                child.kill()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 10 <= len(finished) < SHARDS
    process = _start(tmp_path, model)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait() == 0
    assert f"{SHARDS * ROWS} rows" in output
    files = sorted(out.glob("*.parquet"))
    assert len(files) == SHARDS
    for path, modified in finished.items():
        assert path.stat().st_mtime_ns == modified
    encoder = open_encoder(str(model))
    for item in plan([str(tmp_path / "corpus")], str(tmp_path / "single")):
        embed_shard(encoder, **item)
        path = Path(item["file"])
        assert path.read_bytes() == (out / path.name).read_bytes()
