"""The official code from a user's clone, in a process of its own that stays and answers requests one after the other.

See `clone_program` for why it needs one. Tensors travel by way of files in memory or on disk, and that is part of
the time: some milliseconds, where the official model takes seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from . import clone_program
from .engine import Built, Clock, ComposedSearch, Pairs

_PATIENCE_S = 60


class OfficialCodeEngine(ComposedSearch):
    """The clone's retrieval model on the weights of a model.

    Raises:
        UnavailableError: the folder is no such clone, or its code does not run here; says what it said.
    """

    def __init__(self, model: XFM, clone: Path, scratch: Path) -> None:
        if not (clone / "models" / "xfm.py").is_file():
            raise UnavailableError(f"{clone} has no models/xfm.py; name a clone of the official repository")
        self.model = model
        self._folder = Path(tempfile.mkdtemp(dir=scratch, prefix="official-"))
        weights = self._folder / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
        settings = {
            "clone": str(clone.resolve()),
            "weights": str(weights),
            "threads": torch.get_num_threads(),
            "config": model.config.model_dump(),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(clone_program.__file__).resolve()), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        weakref.finalize(self, _end, self._process)
        self._read()
        weights.unlink()

    def embed_images(self, pixels: Tensor, clock: Clock) -> Tensor:
        return self._ask("embed-image", pixels=pixels)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor, clock: Clock) -> Tensor:
        return self._ask("embed-text", ids=input_ids, mask=attention_mask)

    def rerank(self, pairs: Pairs, clock: Clock) -> Tensor:
        return self._ask(
            "rerank", images=pairs.images, embeds=pairs.embeds, mask=pairs.mask, image_of=pairs.image_of
        )  # fmt: skip

    def _ask(self, work: str, **tensors: Tensor) -> Tensor:
        inputs, outputs = self._folder / "inputs.safetensors", self._folder / "outputs.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, inputs)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"work": work, "inputs": str(inputs), "outputs": str(outputs)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UnavailableError("the process of the official code has ended") from None
        self._read()
        return load_file(outputs)["result"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message = json.loads(line) if line else {"error": f"its process ended with status {self._process.wait()}"}
        if "error" in message:
            raise UnavailableError(f"the official code failed: {message['error']}")
        return message


def _end(process: subprocess.Popen[str]) -> None:
    """End of input is how the process is asked to leave."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def build(model: XFM, clone: Path, scratch: Path) -> Built:
    """Start the process and wait until its model is loaded."""
    begun = time.perf_counter()
    engine = OfficialCodeEngine(model, clone, scratch)
    return Built(engine, load_s=time.perf_counter() - begun)
