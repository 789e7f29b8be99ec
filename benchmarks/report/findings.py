"""The words of a report: its title, the numbers at its head, what a reader must know first, and the circumstances.

Every speed-up against the reference names the types of both sides, and the ratio in one type stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

from ..record import OURS, Comparison, Document, Row
from .table import marks, number, si, span, speed, times, work

TITLES = {
    "suite": "Fast against official",
    "scenario": "Beside other runtimes",
    "sweep": "Cost as work grows",
    "coco": "A whole retrieval evaluation",
    "vqa": "Questions answered, fast against official",
    "train-step": "A training step, fast against official",
    "drop-in": "accelerate(model), against the model untouched",
    "kernels": "Operations, against their alternatives",
    "serve": "The HTTP service under load, against one request at a time",
    "device": "The first hour on a GPU",
    "cold-start": "From the start of a process to its first caption",
    "sessions": "Exports: sessions, and their libraries by themselves",
}


@dataclass(frozen=True)
class Headline:
    """A speed-up at the head of a report: of several results the one that is surely good, not a lucky one.

    Attributes:
        what: the work; `about`: what was compared; `like_for_like`: the ratio in one type, if it is another one.
    """

    factor: str
    what: str
    about: str
    interval: str
    like_for_like: str = ""


def best_of(candidates: Iterable[tuple[Row, Comparison]]) -> tuple[Row, Comparison]:
    """The best by the lower end of its interval; one that was contended or has none only if there is no other.

    Raises:
        ValueError: there are no candidates.
    """
    return max(candidates, key=lambda c: (not c[0].contended, c[1].low is not None, c[1].low or c[1].ratio))


def headlines(document: Document) -> list[Headline]:
    """One speed-up for each kind of work, and one for the whole evaluation."""
    found: dict[tuple[str, ...], list[tuple[Row, Comparison]]] = {}
    for row in document.measured:
        compared = document.headline(row)
        # The operations are many and small: their charts say more than a number each.
        if compared is not None and document.benchmark not in ("kernels", "device") and row.x is None:
            key = (row.work, row.mode, str(row.point.image_size)) if document.benchmark == "suite" else row.place[:2]
            found.setdefault(key, []).append((row, compared))
    made = []
    for candidates in found.values():
        row, against = best_of(candidates)
        beside = document.beside(row, against.contender, against.dtype)
        value, unit, _ = speed(row)
        label = beside.title if beside else f"{against.contender}, {against.dtype}"
        same = document.like_for_like(row)
        interval = span(against.low, against.high)
        made.append(
            Headline(
                f"{times(against.ratio)} {marks(row)}".rstrip(),
                row.name.split(" (")[0] + ("" if row.mode == "offline" else f", {row.mode}"),
                f"{number(value)} {unit} in {row.dtype}, against {label}",
                f"95% interval {interval}" if interval else "without an interval",
                "" if same is None or against.like_for_like else f"{times(same.ratio)} like for like, both {row.dtype}",
            )
        )
    if document.coco:
        whole = document.coco.speed_up
        interval = span(whole.low, whole.high)
        official = next((f", {run.dtype}" for run in document.coco.evaluations if run.procedure != OURS), "")
        about = (
            f"{document.coco.images:,} images, {document.coco.texts:,} texts, against the official algorithm{official}"
        )
        made.append(
            Headline(times(whole.value), "whole evaluation", about, f"95% interval {interval}" if interval else "")
        )
    return made


def remarks(document: Document) -> Iterator[tuple[str, str]]:
    """Remarks that a reader must see first: (`bad`, `warning` or nothing, a sentence)."""
    if document.interrupted:
        yield "bad", "The run was interrupted: rows marked * hold the samples until then, later ones are missing."
    for row in document.rows:
        if row.status in ("failed", "parity failed") and not row.bounds:
            yield "bad", f"{row.title}, {work(row)}: {row.status}: {row.reason or 'no reason is known'}"
    if document.coco and document.coco.parity and not document.coco.parity.passed:
        yield "bad", "The whole evaluation's scores differ from the official ones by more than their type allows."
    if document.options.get("quick") or document.options.get("small"):
        yield "", "Short form: less work and fewer samples than the full measurement."
    said = [note for note in dict.fromkeys(r.conditions.note for r in document.rows if r.conditions) if note]
    if any(row.contended for row in document.measured):
        why = "; ".join(said) or "its probes moved by more than 10% meanwhile"
        yield "warning", f"† something else ran on this machine: {why}."
    else:
        yield from (("warning", note) for note in said)
    named = document.benchmark == "drop-in" and "model" in document.options
    if (document.benchmark == "drop-in" and not named) or (document.model and not document.model.trained):
        nothing = "; retrieval quality means nothing" if _recalls(document) else ""
        yield "", f"The weights are random: speeds and differences are real{nothing}."
    elif document.model and not document.model.meaningful_recall and _recalls(document):
        yield "", "Retrieval quality means nothing: no --tokenizer was given."


def _recalls(document: Document) -> list[dict[str, float]]:
    return [row.recall for row in document.rows if row.recall]


def links() -> dict[str, str]:
    """The project's addresses by name, as its package gives them."""
    try:
        named = metadata.metadata("xfm-fast").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        named = []
    return {name: address for name, _, address in (entry.partition(", ") for entry in named)}


def place(document: Document) -> str:
    """Version, machine, threads, PyTorch and date in one line."""
    machine = document.machine
    gpus = ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) if document.device == "cuda" else ""
    threads = machine.get("threads", 1)
    return (
        f"{OURS} {machine.get('xfm_fast')} on {gpus or machine.get('cpu', 'an unknown processor')}, {threads} "
        f"{'thread' if threads == 1 else 'threads'}, PyTorch {machine.get('torch', '?')}, "
        f"{document.date.replace('T', ' ').replace('+00:00', ' UTC')}"
    )


def description(document: Document) -> str:
    """One sentence for those who are shown a link."""
    found = [f"{one.factor} at {one.what} ({one.about})" for one in headlines(document)]
    return ". ".join([*found[:2], place(document)])


def facts(document: Document) -> list[tuple[str, str]]:
    """Facts about what was measured and how well it agrees: (name, words)."""
    found = []
    judged = [(row, row.parity) for row in document.rows if row.ours and row.parity]
    known = [(row, one) for row, one in judged if one.error is not None and one.band]
    if known and all(one.passed for _, one in judged):
        row, worst = max(known, key=lambda pair: (pair[1].error or 0) / (pair[1].band or 1))
        words = f"{row.name} {row.dtype}, {worst.error:.1e} of {worst.band:.1e}"
        found.append(("parity", f"equal in all {len(judged)} comparisons (closest to its limit: {words})"))
    if counts := sorted({len(row.samples) for row in document.measured if row.samples}):
        spread = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        found.append(("samples", f"medians of {spread} samples, which took turns"))
    if model := document.model:
        found.append(("model", f"{model.preset}, {model.parameters / 1e6:.0f}M parameters, {model.origin}"))
    if recalls := _recalls(document):
        recall, ways = recalls[0], {"text": "txt", "image": "img"}
        depths = {way: "/".join(f"{recall[f'{key}_r{k}']:.0f}" for k in (1, 5, 10)) for way, key in ways.items()}
        found.append(("retrieval", ", ".join(f"{way} R@1/5/10 {text}" for way, text in depths.items())))
    if data := document.data:
        unread = f"; {data.left_unread} more photographs were not looked at" if data.left_unread else ""
        found.append(("data", f"{data.photos} photographs, {data.captions} captions; {data.origin}{unread}"))
        found.append(("tokens", f"{data.tokenizer}, {data.vocabulary} entries"))
    if cold := document.cold_start:
        parts = f"imports {cold.process_s:.1f}, weights {cold.load_s:.1f}, first call {cold.first_call_s:.1f}"
        found.append(("cold start", f"{cold.total_s:.1f} s: {parts}"))
    for row in document.measured:
        if row.ours and row.memory and row.memory.gradient_bytes is not None:
            found.append((f"peak memory, {row.work} {row.dtype}", _memory(document, row)))
    for dtype, probe in document.probes.items():
        copies = f", copies {si(probe.copy_bytes_per_s, 'B/s')}" if probe.copy_bytes_per_s else ""
        rate = f"matrix products {si(probe.gemm_flops_per_s, 'FLOP/s')} ({probe.library})"
        found.append((f"probes, {dtype}", rate + copies))
    found.append(("no energy", next((row.energy_note for row in document.rows if row.energy_note), None) or ""))
    absent = [f"{one.label} ({one.reason})" for one in document.baselines if not one.present]
    found.append(("absent", "; ".join(absent)))
    return [(name, words) for name, words in found if words]


def _memory(document: Document, row: Row) -> str:
    other = document.beside(row, document.reference, row.dtype) or document.reference_row(row)
    if other is None or other.memory is None or row.memory is None:
        return ""
    ours, theirs = row.memory, other.memory
    own = f"{ours.grown_bytes / theirs.grown_bytes:.0%}" if theirs.grown_bytes else "?"
    least = ours.checkpointed_bytes
    checkpointed = f"; {least / theirs.peak_bytes:.0%} with activation checkpointing" if least else ""
    return (
        f"{ours.peak_bytes / theirs.peak_bytes:.0%} of {other.title} ({ours.peak_bytes / 1e9:.2f} of "
        f"{theirs.peak_bytes / 1e9:.2f} GB); beyond parameters and gradients {own} ({ours.grown_bytes / 1e9:.2f} of "
        f"{theirs.grown_bytes / 1e9:.2f} GB){checkpointed}; {ours.method}"
    )


def circumstances(document: Document) -> list[tuple[str, str]]:
    """The machine, versions and command that let someone else measure the same: (name, words)."""
    machine = document.machine
    present = [f"{one.label} {one.version or ''}".rstrip() for one in document.baselines if one.present]
    cores = [machine.get("cores_physical"), machine.get("cores_logical"), machine.get("threads")]
    commit = machine.get("commit") or "no git checkout"
    libraries = [name for name in ("mkl", "onednn") if machine.get(name)]
    found = [
        ("processor", f"{machine.get('cpu')} ({', '.join(machine.get('cpu_features', []))})"),
        ("GPU", "; ".join(f"{gpu['name']}, {gpu['memory_gb']} GB" for gpu in machine.get("gpus", []))),
        ("cores", "{} physical, {} logical, {} used".format(*cores)),
        ("memory", f"{machine.get('memory_gb')} GB, {machine.get('memory_available_gb')} GB available at the start"),
        ("load", ", ".join(str(load) for load in machine.get("load_average", []))),
        ("system", f"{machine.get('system')}, Python {machine.get('python')}"),
        ("PyTorch", ", ".join([str(machine.get("torch")), *libraries])),
        ("versions", ", ".join(f"{name} {said}" for name, said in machine.get("versions", {}).items() if said)),
        (OURS, f"{machine.get('xfm_fast')}, commit {commit}{', with changes' if machine.get('dirty') else ''}"),
        ("contenders", ", ".join(present)),
        ("paths", "; ".join(f"{one.operation} {one.dtype}: {one.chosen}" for one in document.selections)),
        ("command", " ".join(document.command)),
        ("duration", f"{document.duration_s:.0f} s" if document.duration_s else ""),
    ]
    return [(name, words) for name, words in found if words]
