"""Facts about the machine, for the head of the document."""

from __future__ import annotations

from .. import machine
from .worker import Context


def describe(context: Context) -> None:
    """Keep hardware, system and versions; and the kind of GPU, whose data sheet shares are told of."""
    facts = machine.describe()
    context.add_machine(facts)
    device = machine.choose_device(context.device)
    if device.type == "cuda":
        sheet = machine.data_sheet(device)
        context.add(
            "machine", facts["gpus"][0]["name"], "PyTorch sees it",
            reason=None if sheet else "no data sheet of it is known: shares of its peak are left out",
        )  # fmt: skip
