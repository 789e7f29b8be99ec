"""From the start of a process to its first caption: interpreter, imports, weights from a safetensors folder, one text.

Every sample is a process of its own, so nothing is imported, mapped or packed yet; the file is in the page cache, where
the process that wrote it left it. Beside xfm-fast stand Hugging Face's RoBERTa of the same sizes, the text encoder
alone, and a process that imports PyTorch and does nothing, which bounds them all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from xfm_fast import checkpoint
from xfm_fast.checkpoint import Head
from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.cpu import int8
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer

from .. import machine
from ..contenders.public_modules import text_module
from ..material import photographs
from ..material.inputs import described, make_tokenizer, preset_config, random_state
from ..measure import DTYPES, MachineProbes, Progress, agreeing, filled, interleave
from ..options import ColdStartOptions
from ..record import HUGGING_FACE, OURS, Document, Model, Row, Share

BARE = "import-torch"
_LABELS = {OURS: "xfm-fast", HUGGING_FACE: "Hugging Face transformers, text encoder alone", BARE: "import torch alone"}
_HEADS: tuple[Head, ...] = ("contrastive", "matching", "boxes")
_STAGES = ("interpreter and imports", "weights", "first caption")
# A stage of less is one that the process does not have.
_LEAST_S = 1e-3
# The child tells the times at which a stage ended, on the clock that its parent started it by.
_TOLD = "print(json.dumps([imported, loaded, time.time()]), flush=True)"
_CHILDREN = {
    OURS: f"""
import json, sys, time
import torch
from xfm_fast import XFM
imported = time.time()
folder, caption, dtype = sys.argv[1:4]
model = XFM.from_pretrained(folder, dtype="int8" if dtype == "int8" else getattr(torch, dtype))
loaded = time.time()
model.encode(caption)
{_TOLD}
""",
    HUGGING_FACE: f"""
import json, sys, time
import torch
from transformers import PreTrainedTokenizerFast, RobertaModel
imported = time.time()
folder, caption, dtype = sys.argv[1:4]
model = RobertaModel.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).eval()
tokenizer = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
loaded = time.time()
with torch.inference_mode():
    model(input_ids=torch.tensor([tokenizer(caption)["input_ids"]]))
{_TOLD}
""",
    BARE: f"""
import json, time
import torch
imported = loaded = time.time()
{_TOLD}
""",
}


class _Starts:
    """A block of one process from its start to its first caption; what its stages took is kept."""

    def __init__(self, contender: str, arguments: Sequence[str], threads: int) -> None:
        self._command = [sys.executable, "-c", _CHILDREN[contender], *arguments]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.stages: list[list[float]] = []

    def __call__(self) -> list[float]:
        pipe, begun = subprocess.PIPE, time.time()
        with subprocess.Popen(
            self._command, env=self._environment, stdout=pipe, stderr=pipe, text=True, encoding="utf-8"
        ) as process:
            told, errors = process.communicate()
        if process.returncode:
            raise UnavailableError(f"the process failed: {(errors.strip() or 'without a word').splitlines()[-1]}")
        # What it did after its caption, such as giving back memory, is not counted.
        ends = json.loads(told.splitlines()[-1])
        self.stages.append([end - start for start, end in zip([begun, *ends], ends, strict=False)])
        return [sum(self.stages[-1])]

    def shares(self) -> list[Share]:
        """Medians of the stages."""
        seconds = [statistics.median(stage) for stage in zip(*self.stages, strict=True)]
        named = [(name, s) for name, s in zip(_STAGES, seconds, strict=True) if s > _LEAST_S]
        return [Share(name=name, seconds=s, share=s / sum(seconds)) for name, s in named]


def run(options: ColdStartOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure this machine. An interruption (Ctrl-C) ends the run early and keeps the samples until then.

    Raises:
        XFMError: an option cannot be used.
    """
    begun, progress = time.perf_counter(), progress or Progress()
    threads = options.threads or machine.default_threads()
    torch.set_num_threads(threads)
    names, absent = machine.choose_dtypes(options.dtype)
    if why := int8.why_not():
        absent["int8"] = why
    document = Document.begun("cold-start", vars(options), command, "cpu")
    progress.begin(2)
    with tempfile.TemporaryDirectory(prefix="xfm-cold-start-") as scratch:
        progress.stage("weights of random numbers")
        collection = photographs.bundled()
        tokenizer = make_tokenizer(options.preset, None, collection)
        document.data = described(collection, tokenizer)
        document.model, folders = _written(options, tokenizer, Path(scratch))
        probes = MachineProbes(names, torch.device("cpu"))
        document.probes = probes.describe()
        starts: dict[str, _Starts] = {}
        for contender, folder in folders.items():
            types = names if contender == HUGGING_FACE or "int8" in absent else [*names, "int8"]
            for name in ["fp32"] if contender == BARE else types:
                spelt = "int8" if name == "int8" else str(DTYPES[name]).removeprefix("torch.")
                starts[f"{contender} {name}"] = _Starts(
                    contender, [str(folder), collection.captions[0], spelt], threads
                )
        progress.stage("processes started")
        samples = interleave(
            starts, probes, rounds=2 if options.quick else 5, budget_s=0.0, warmups=1, on_step=progress.step
        )
    rows = [_row(OURS, name).model_copy(update={"status": "not offered", "reason": r}) for name, r in absent.items()]
    for key, start in starts.items():
        row = filled(_row(*key.split(" ")), key, samples)
        rows.append(row.model_copy(update={"stages": start.shares()}) if row.measured else row)
    document.rows = agreeing(rows)
    document.interrupted = samples.interrupted
    document.duration_s = time.perf_counter() - begun
    return document


def _written(options: ColdStartOptions, tokenizer: CaptionTokenizer, scratch: Path) -> tuple[Model, dict[str, Path]]:
    """The folder that every contender starts from."""
    config = preset_config(options.preset)
    with checkpoint.without_values():
        model = XFM(config, heads=_HEADS)
    model.load_state_dict(random_state(config, _HEADS, options.seed), assign=True)
    model.tokenizer = tokenizer
    model.save_pretrained(scratch / OURS)
    folders = {OURS: scratch / OURS, BARE: scratch}
    if importlib.util.find_spec("transformers") is not None:
        folders[HUGGING_FACE] = scratch / HUGGING_FACE
        text_module(importlib.import_module("transformers"), model).save_pretrained(folders[HUGGING_FACE])
        shutil.copy(scratch / OURS / "tokenizer.json", folders[HUGGING_FACE])
    about = Model(
        preset=options.preset, origin=f"random weights (seed {options.seed})", trained=False, meaningful_recall=False,
        config=config.model_dump(), parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    return about, folders


def _row(contender: str, name: str) -> Row:
    return Row(
        work="cold-start", contender=contender, label=_LABELS[contender], dtype=name, status="measured",
        name="a process until its first caption", unit="starts", items=1, bounds=contender == BARE,
    )  # fmt: skip
