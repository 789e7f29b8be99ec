"""The words of a report: its title, the numbers at its head, what a reader must know first, and the circumstances.

Every speed-up against the reference names the types of both sides, and the ratio in one type stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

from ..record import OURS, Comparison, Document, Result
from .table import marks, number, si, span, speed, times, work


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


def best_of(candidates: Iterable[tuple[Result, Comparison]]) -> tuple[Result, Comparison]:
    """The best by the lower end of its interval; one that was contended or has none only if there is no other.

    Raises:
        ValueError: there are no candidates.
    """
    return max(candidates, key=lambda c: (not c[0].contended, c[1].low is not None, c[1].low or c[1].ratio))


def headlines(document: Document) -> list[Headline]:
    """One speed-up for each kind of work, and one for the whole evaluation."""
    found: dict[tuple[str, ...], list[tuple[Result, Comparison]]] = {}
    for row in document.measured:
        compared = document.headline(row)
        # The operations are many and small: their charts say more than a number each.
        if compared is not None and document.benchmark not in ("kernels", "device"):
            key = row.place if document.benchmark == "suite" else row.place[:2]
            found.setdefault(key, []).append((row, compared))
    made = []
    for candidates in found.values():
        row, against = best_of(candidates)
        beside = document.beside(row, against.backend, against.dtype)
        value, unit, _ = speed(row)
        label = beside.title if beside else f"{against.backend}, {against.dtype}"
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
    return made


def remarks(document: Document) -> Iterator[tuple[str, str]]:
    """Remarks that a reader must see first: (`bad`, `warning` or nothing, a sentence)."""
    if document.interrupted:
        yield "bad", "The run was interrupted: rows marked * hold the samples until then, later ones are missing."
    for row in document.rows:
        if row.status in ("failed", "parity failed") and not row.extra.get("bounds"):
            yield "bad", f"{row.title}, {work(row)}: {row.status}: {row.reason or 'no reason is known'}"
    if document.options.get("quick") or document.options.get("small"):
        yield "", "Short form: less work and fewer samples than the full measurement."
    said = [note for note in dict.fromkeys(row.text("note") for row in document.rows) if note]
    if any(row.contended for row in document.measured):
        why = "; ".join(said) or "its probes moved by more than 10% meanwhile"
        yield "warning", f"† something else ran on this machine: {why}."
    else:
        yield from (("warning", note) for note in said)
    if document.benchmark == "drop-in" or (document.model and not document.model.trained):
        nothing = "; retrieval quality means nothing" if _recalls(document) else ""
        yield "", f"The weights are random: speeds and differences are real{nothing}."
    elif document.model and not document.model.meaningful_recall and _recalls(document):
        yield "", "Retrieval quality means nothing: no --tokenizer was given."


def _recalls(document: Document) -> list[dict[str, float]]:
    return [found for row in document.rows if (found := row.parts("recall"))]


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
    if counts := sorted({len(row.seconds) for row in document.measured if row.seconds}):
        spread = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        found.append(("samples", f"medians of {spread} samples, which took turns"))
    if model := document.model:
        found.append(("model", f"{model.preset}, {model.parameters / 1e6:.0f}M parameters, {model.origin}"))
    if recalls := _recalls(document):
        recall, ways = recalls[0], {"text": "txt", "image": "img"}
        depths = {way: "/".join(f"{recall.get(f'{key}_r{k}', 0):.0f}" for k in (1, 5, 10)) for way, key in ways.items()}
        found.append(("retrieval", ", ".join(f"{way} R@1/5/10 {text}" for way, text in depths.items())))
    if data := document.data:
        unread = f"; {data.left_unread} more photographs were not looked at" if data.left_unread else ""
        found.append(("data", f"{data.photos} photographs, {data.captions} captions; {data.origin}{unread}"))
        found.append(("tokens", f"{data.tokenizer}, {data.vocabulary} entries"))
    if cold := document.cold_start:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in cold.items())
        found.append(("cold start", f"{sum(cold.values()):.1f} s: {parts}"))
    for row in document.measured:
        if row.ours and row.number("gradient_bytes") is not None:
            found.append((f"peak memory, {row.work} {row.dtype}", _memory(document, row)))
    for dtype, probe in document.probes.items():
        copies = f", copies {si(probe.copy_bytes_per_s, 'B/s')}" if probe.copy_bytes_per_s else ""
        rate = f"GEMMs {si(probe.gemm_flops_per_s, 'FLOP/s')} ({probe.library})"
        found.append((f"probes, {dtype}", rate + copies))
    found.append(("no energy", document.energy_note or ""))
    absent = [f"{one.label} ({one.reason})" for one in document.baselines if one.reason]
    found.append(("absent", "; ".join(absent)))
    return [(name, words) for name, words in found if words]


def _memory(document: Document, row: Result) -> str:
    other = document.beside(row, document.reference, row.dtype) or document.reference_row(row)
    peak, theirs = row.number("peak_bytes"), None if other is None else other.number("peak_bytes")
    if other is None or not peak or not theirs:
        return ""
    grown, others = row.number("grown_bytes") or 0, other.number("grown_bytes") or 0
    own = f"{grown / others:.0%}" if others else "?"
    least = row.number("checkpointed_bytes")
    checkpointed = f"; {least / theirs:.0%} with activation checkpointing" if least else ""
    return (
        f"{peak / theirs:.0%} of {other.title} ({peak / 1e9:.2f} of {theirs / 1e9:.2f} GB); beyond parameters and "
        f"gradients {own} ({grown / 1e9:.2f} of {others / 1e9:.2f} GB){checkpointed}; {row.text('memory_method')}"
    )


def circumstances(document: Document) -> list[tuple[str, str]]:
    """The machine, versions and command that let someone else measure the same: (name, words)."""
    machine = document.machine
    present = [f"{one.label} {one.version or ''}".rstrip() for one in document.baselines if not one.reason]
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
        ("paths", "; ".join(f"{operation}: {chosen}" for operation, chosen in document.paths.items())),
        ("command", " ".join(document.command)),
        ("duration", f"{document.duration_s:.0f} s" if document.duration_s else ""),
    ]
    return [(name, words) for name, words in found if words]
