"""Peak memory of a training step on a CPU: each procedure in a process of its own, which has done nothing else.

Within one process the second procedure would find the heap as the first one left it, and the high-water mark would
belong to whichever needed more. Run as a program, this file is that process: it reads a folder with the configuration
and the batch, and prints one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xfm_fast.batches import PairBatch
from xfm_fast.benchmarks.training_subject import AUTOCAST, Procedure, TrainingSubject
from xfm_fast.config import XFMConfig
from xfm_fast.errors import UnavailableError
from xfm_fast.memory import PeakMemory, resident_bytes

_STEPS = 2
_BATCH, _TASK = "batch.safetensors", "task.json"


@dataclass(frozen=True)
class MemoryUse:
    """What one procedure needs.

    Attributes:
        peak_bytes: highest memory during the step.
        before_bytes: in use before it: interpreter, libraries, parameters and batch.
        parameter_bytes, gradient_bytes: of the model; every procedure holds both.
        method: how the peak was found.
    """

    peak_bytes: int
    before_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    method: str

    @property
    def activation_bytes(self) -> int:
        """What the step takes beyond its gradients and what was there before."""
        return max(0, self.peak_bytes - self.before_bytes - self.gradient_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return asdict(self) | {"activation_bytes": self.activation_bytes}


def memory_use(
    procedure: Procedure,
    config: XFMConfig,
    batch: PairBatch,
    dtype: str,
    *,
    training: bool,
    seed: int,
    threads: int,
) -> MemoryUse:
    """Run two steps of one procedure in a new process and see how much memory it takes.

    Args:
        dtype: a key of `AUTOCAST`.
        training: with dropout and stochastic depth.

    Raises:
        UnavailableError: the process ended otherwise than planned; it is killed where memory runs out.
    """
    task = {
        "procedure": procedure,
        "config": config.model_dump(),
        "dtype": dtype,
        "training": training,
        "seed": seed,
        "threads": threads,
    }
    with tempfile.TemporaryDirectory(prefix="xfm-step-") as name:
        folder = Path(name)
        tensors = {name: tensor for name, tensor in vars(batch).items() if isinstance(tensor, Tensor)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / _BATCH)
        (folder / _TASK).write_text(json.dumps(task))
        command = [sys.executable, "-m", __name__, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UnavailableError(
            f"the process that measures the memory of a step ({procedure}, {dtype}) failed: {why[0]}; free memory, or "
            "take fewer --pairs or --preset tiny"
        )
    return MemoryUse(**json.loads(done.stdout.splitlines()[-1]))


def cuda_memory_use(peak_bytes: int, model: nn.Module) -> MemoryUse:
    """The same from what CUDA's allocator counted during a step of `model`, whose gradients are still there."""
    parameters, gradients = _held(model)
    return MemoryUse(peak_bytes, parameters, parameters, gradients, "CUDA allocator")


def _held(model: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters and of their gradients."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return sum(parameter.nbytes for parameter in parameters), sum(gradient.nbytes for gradient in gradients)


def _measure(folder: Path) -> MemoryUse:
    task = json.loads((folder / _TASK).read_text())
    torch.set_num_threads(task["threads"])
    tensors: dict[str, Any] = load_file(folder / _BATCH)
    batch = PairBatch(**tensors)
    config, device = XFMConfig(**task["config"]), torch.device("cpu")
    subject = TrainingSubject(config, batch, seed=task["seed"], device=device)
    subject.model.train(task["training"])
    before = resident_bytes()
    with PeakMemory() as memory:
        for _ in range(_STEPS):
            subject.step(task["procedure"], AUTOCAST[task["dtype"]])
    parameters, gradients = _held(subject.model)
    return MemoryUse(memory.peak, before, parameters, gradients, memory.method)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(Path(sys.argv[1])))))
