"""Processes from their start to their first caption, on the tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xfm_fast import XFM, XFMConfig
from xfm_fast.benchmarks.options import ColdStartOptions
from xfm_fast.benchmarks.record import HUGGING_FACE, OURS
from xfm_fast.benchmarks.work import cold_start
from xfm_fast.errors import UnavailableError
from xfm_fast.tokenizer import CaptionTokenizer

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


@pytest.mark.slow
def test_rows() -> None:
    before = torch.get_num_threads()
    try:
        document = cold_start.run(ColdStartOptions(preset="tiny", quick=True, threads=1, dtype=("fp32",)))
    finally:
        torch.set_num_threads(before)
    assert document.ok
    assert document.reference == HUGGING_FACE
    rows = {(row.contender, row.dtype): row for row in document.rows if row.measured}
    ours, bare = rows[OURS, "fp32"], rows[cold_start.BARE, "fp32"]
    assert [stage.name for stage in ours.stages] == ["interpreter and imports", "weights", "first caption"]
    assert sum(stage.share for stage in ours.stages) == pytest.approx(1)
    assert (ours.unit, ours.items, len(ours.seconds)) == ("starts", 1, 2)
    assert bare.bounds
    assert len(bare.stages) == 1
    if (HUGGING_FACE, "fp32") in rows:
        assert document.headline(ours) is not None


def test_a_process_that_fails_says_its_last_line() -> None:
    start = cold_start._Starts(OURS, ["/there/is/no/such/folder", "a caption", "float32"], 1)
    with pytest.raises(UnavailableError, match=r"process failed: .*no/such/folder"):
        start()
    assert not start.stages


def test_a_caption_needs_neither_the_compiler_nor_torchvision(tmp_path: Path) -> None:
    """What a process imports until its first caption; sympy, triton and PyTorch's compiler took most of that time."""
    model = XFM(XFMConfig.preset("tiny"))
    model.tokenizer = CaptionTokenizer.train_on_texts(["a dog on a beach"], 300)
    model.save_pretrained(tmp_path)
    told = (
        "import sys; from xfm_fast import XFM; m = XFM.from_pretrained(sys.argv[1]); m.encode('a dog on a beach'); "
        "print([name for name in ('torch._dynamo', 'torchvision', 'sympy', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", told, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
