"""Snapshot of what the package offers and computes, to compare before and after a refactoring.

    python -m tests.same write before.json
    python -m tests.same compare before.json        # exit code 1 and a line per difference

Sections: public signatures, commands with options, outputs and gradients of the tiny presets, the manifest of an
export, `accelerate` on every family, the rows of a quick benchmark. Numbers are compared to 1e-5 of the larger one.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast import XFM, XFMConfig, accelerate

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5
# Of a manifest, what differs by machine and moment.
VOLATILE = ("sha256", "seconds", "versions", "size", "created", "commit", "bytes", "error", "machine")


def public_names() -> dict[str, str]:
    """The signatures of every name on the page of the API, and of its members."""
    found = {}
    pages = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name in pages:
        try:
            target: Any = importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            target = getattr(importlib.import_module(module), attribute)
        found[name] = _signature(target)
        members = target.__dict__ if inspect.isclass(target) or inspect.ismodule(target) else {}
        for member, value in members.items():
            own = inspect.ismodule(target) is False or getattr(value, "__module__", None) == target.__name__
            if not member.startswith("_") and callable(value) and own:
                found[f"{name}.{member}"] = _signature(value)
    return found


def _signature(target: Any) -> str:
    try:
        return str(inspect.signature(target))
    except (TypeError, ValueError):
        return type(target).__name__


def commands() -> dict[str, list[str]]:
    """The options of every command."""
    from xfm_fast.cli.app import app

    def walk(node: Any, words: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
        names = [name for name in node if not name.startswith("-")]
        if not names or node.default_command is not None:
            arguments = node.assemble_argument_collection() if node.default_command is not None else []
            yield " ".join(words), sorted({name for argument in arguments for name in argument.names})
        for name in names:
            yield from walk(node[name], (*words, name))

    return dict(walk(app, ("xfm-fast",)))


def _fingerprint(tensor: Tensor) -> list[float]:
    """Norm and two projections, in float64."""
    flat = tensor.detach().double().flatten()
    generator = torch.Generator().manual_seed(flat.numel())
    weights = torch.randn(2, flat.numel(), generator=generator, dtype=torch.float64)
    return [float(flat.norm()), *(weights @ flat).tolist()]


def model_outputs() -> dict[str, list[float]]:
    """Encoders, fusion, heads and gradients of a random tiny model."""
    torch.manual_seed(0)
    model = XFM(XFMConfig.preset("tiny")).eval()
    size = model.config.image_size
    pixels, ids = torch.randn(2, 3, size, size), torch.randint(5, 60, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    index = torch.tensor([0, 1, 1])
    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    fused = model.fuse(text, mask, model.image_memory(image), image_index=index)
    outputs = {
        "image": image, "text": text * mask[..., None], "image feature": model.project_image(image),
        "text feature": model.project_text(text), "match": model.match_logits(fused), "box": model.predict_boxes(fused),
    }  # fmt: skip
    sum((part.float() ** 2).sum() for part in outputs.values()).backward()  # type: ignore[union-attr]
    found = {name: _fingerprint(part) for name, part in outputs.items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"gradient of {name}": _fingerprint(gradient) for name, gradient in gradients.items()}


def export_manifest() -> Any:
    """The manifest of an ONNX export without what differs by machine."""
    from xfm_fast.export import export_onnx

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(XFM(XFMConfig.preset("tiny")).eval(), Path(folder) / "out")
        return _stable(json.loads((Path(folder) / "out/manifest.json").read_text(encoding="utf-8")))


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if not any(part in key for part in VOLATILE)}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def families() -> dict[str, Any]:
    """Outputs of every family accelerated, and the classes that replaced its modules."""
    from tests.replace.families import FAMILIES, states

    found = {}
    for kind, case in FAMILIES.items():
        model, given = case.model(torch.float32), case.inputs(torch.float32)
        report = accelerate(model.eval())
        replaced = sorted({f"{entry.class_name} -> {entry.fused}" for entry in report.replaced})
        with torch.no_grad():
            found[kind] = {"replaced": replaced, "output": _fingerprint(states(model, given))}
    return found


def benchmark() -> list[str]:
    """Work, backend, dtype and status of the rows of a quick run on the tiny preset."""
    from tests.cli.runner import invoke

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        invoke(["bench", "--random", "tiny", "--quick", "--out", file])
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return sorted(f"{row['work']} {row['backend']} {row['dtype']} {row['status']}" for row in rows)


SECTIONS: dict[str, Callable[[], Any]] = {
    "api": public_names, "commands": commands, "model": model_outputs, "export": export_manifest,
    "families": families, "benchmark": benchmark,
}  # fmt: skip


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """A line per difference, with its place."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if key not in after or key not in before:
                yield f"{place}/{key}: {'removed' if key in before else 'added'}"
            else:
                yield from differences(before[key], after[key], f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and all(isinstance(item, str) for item in before + after):
        yield from (f"{place}: - {item}" for item in before if item not in after)
        yield from (f"{place}: + {item}" for item in after if item not in before)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif isinstance(before, float) and isinstance(after, float):
        if abs(before - after) > TOLERANCE * max(abs(before), abs(after), 1.0):
            yield f"{place}: {before} -> {after}"
    elif before != after:
        yield f"{place}: {before} -> {after}"


def main(arguments: list[str]) -> int:
    """Write a snapshot, or compare with one; further words name the sections."""
    action, file, *chosen = arguments
    torch.use_deterministic_algorithms(True)
    found = {name: SECTIONS[name]() for name in chosen or SECTIONS}
    if action == "write":
        Path(file).write_text(json.dumps(found, indent=1), encoding="utf-8")
        return 0
    before = json.loads(Path(file).read_text(encoding="utf-8"))
    lines = [line for name in found for line in differences(before.get(name), found[name], name)]
    print("\n".join(lines) or "same")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
