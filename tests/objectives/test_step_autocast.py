"""The step under bf16 autocast: its gradients are as near to fp64 as those of plain PyTorch under autocast."""

from __future__ import annotations

import torch

from tests.objectives.test_step_twin import pair_batch
from xfm_fast.benchmarks.record import OFFICIAL, OURS
from xfm_fast.benchmarks.work.training import TrainingSubject, difference
from xfm_fast.config import XFMConfig

CPU = torch.device("cpu")


def test_gradients_of_a_deep_model() -> None:
    """Depth is what shows it: a post-norm residual stream that every branch rounds loses a little each time."""
    config = XFMConfig.preset("tiny", text_layers=24, fusion_layers=24)
    batch = pair_batch(8, config, 0, ids=False)
    subject = TrainingSubject(config, batch, seed=0, device=CPU)
    truth = TrainingSubject(config, batch, seed=0, device=CPU, dtype=torch.float64).outcome(OFFICIAL)
    plain = difference(subject.outcome(OFFICIAL, torch.bfloat16), truth)
    found = difference(subject.outcome(OURS, torch.bfloat16), truth)
    assert set(truth.losses) == {"itc", "itm", "imlm", "mim"}
    assert found.error <= 2 * plain.error + torch.finfo(torch.bfloat16).eps, (found, plain)
