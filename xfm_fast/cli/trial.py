"""`xfm-fast try`: the speed-up of `accelerate` for your own model, on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xfm_fast.benchmarks.options import TryOptions
from xfm_fast.cli.console import note, stdout
from xfm_fast.cli.options import Flat, Json
from xfm_fast.errors import InputError


def trial(
    model: str, /, *, options: Flat[TryOptions] = TryOptions(), png: Path | None = None, as_json: Json = False
) -> int:
    """Measure the speed-up of accelerate(model) for your model: verified, timed in interleaved rounds, with the code.

    Weights are read from safetensors or as plain values, never executed; only --png writes a file.

    Exit code 1: an accelerated form differs from the model, and is not timed.

    Args:
        model: A folder written by save_pretrained, a name on the Hugging Face Hub, or timm:NAME.
        png: File that receives a picture of 1200 by 630 to share.
    """
    from xfm_fast.benchmarks import report
    from xfm_fast.benchmarks.work import trial as trials
    from xfm_fast.cli.bench import progress

    if png is not None and png.is_dir():
        raise InputError(f"--png {png} is a folder; name a file")
    with progress() as display:
        found = trials.run(model, options, display, ["xfm-fast", *sys.argv[1:]])
    if png is not None:
        report.png(found.document, png)
        note(f"saved: {png}")
    if as_json:
        print(json.dumps({"line": found.line, "told": found.told, "document": found.document.model_dump(mode="json")}))
    else:
        report.terminal(found.document, stdout())
        for sentence in found.told:
            stdout().print(sentence, soft_wrap=True, highlight=False, markup=False)
        if found.line is not None:
            stdout().print(f"\npaste this:\n\n    {found.line}\n", soft_wrap=True, highlight=False, markup=False)
    return 130 if found.document.interrupted else int(not found.document.ok)
