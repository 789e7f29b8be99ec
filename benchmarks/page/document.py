"""What every page has: the shell with its style, sections, tables, and the circumstances of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any


@cache
def _style() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def shell(title: str, parts: Iterable[str], *, kind: str = "") -> str:
    """A whole page that needs nothing from elsewhere; empty parts are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><style>{_style()}</style></head>\n<body><main class="{kind}">\n'
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, text: str, content: str) -> str:
    """A panel with a heading and a sentence that says how to read it; `text` and `content` are HTML."""
    return f"<section><h2>{escape(title)}</h2><p class=soft>{text}</p>{content}</section>"


def figure(title: str, drawing: str, *, before: str = "") -> str:
    """A chart with its heading and, before it, a legend."""
    return f"<figure><h3>{escape(title)}</h3>{before}{drawing}</figure>"


def figures(made: Sequence[str]) -> str:
    """Charts side by side where the page is wide enough."""
    return f"<div class=charts>{''.join(made)}</div>" if made else ""


def table(heads: Sequence[str], rows: Iterable[str], *, words: int = 1) -> str:
    """A table in a box of its own that scrolls sideways; the first `words` columns hold text, the others numbers.

    It can be reached and scrolled with the keyboard.
    """
    head = "".join(
        f'<th scope="col"{"" if place < words else " class=n"}>{escape(text)}</th>' for place, text in enumerate(heads)
    )
    return (
        '<div class=wide tabindex="0" role="region" aria-label="table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def line(words: Iterable[str], numbers: Iterable[str] = ()) -> str:
    """A row of a table. Long words get room, so that a table rather scrolls than breaks every word."""
    cells = [f"<td{' class=w' if len(text) > 14 else ''}>{escape(text)}</td>" for text in words]
    cells += [f"<td class=n>{escape(text)}</td>" for text in numbers]
    return f"<tr>{''.join(cells)}</tr>"


def facts_table(facts: Iterable[tuple[str, str]]) -> str:
    """Names and what there is to say of them, without the empty ones."""
    lines = "".join(f'<tr><th scope="row">{name}</th><td>{escape(text)}</td></tr>' for name, text in facts if text)
    return f"<table><tbody>{lines}</tbody></table>"


def notes(found: Iterable[tuple[str, str]]) -> str:
    """Remarks that a reader must see first: (`bad` or nothing, text)."""
    return "".join(f'<p class="note {kind}">{escape(text)}</p>' for kind, text in found)


def when(date: str) -> str:
    """A moment as it is read."""
    return date.replace("T", " ").replace("+00:00", " UTC")


def count(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seconds(value: float) -> str:
    """A time with the unit that suits it."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def duration(value: float) -> str:
    """A time that may be days."""
    if value >= 2 * 86400:
        return f"{value / 86400:.1f} days"
    return f"{value / 3600:.1f} h" if value >= 2 * 3600 else f"{value / 60:.0f} min" if value >= 120 else seconds(value)


def circumstances_line(content: dict[str, Any]) -> str:
    """Machine, threads, PyTorch and date in one line."""
    machine = content["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) if content.get("device") == "cuda" else ""
    where = gpus or machine.get("cpu", "unknown processor")
    threads = count(machine.get("threads", 1), "thread")
    return f"{where}, {threads}, PyTorch {machine.get('torch', '?')}, {when(content['date'])}"


def circumstances(content: dict[str, Any], more: Iterable[tuple[str, str]] = ()) -> str:
    """The section that lets someone else measure the same: machine, versions, commit, data, command."""
    machine = content["machine"]
    commit = machine.get("commit") or "no git checkout"
    cores = (
        f"{machine.get('cores_physical')} physical, {machine.get('cores_logical')} logical, "
        f"{machine.get('threads')} used"
    )
    facts = [
        ("processor", f"{machine['cpu']} ({', '.join(machine.get('cpu_features', []))})"),
        ("GPU", "; ".join(f"{gpu['name']}, {gpu['memory_gb']} GB" for gpu in machine.get("gpus", []))),
        ("cores", cores),
        (
            "memory",
            f"{machine.get('memory_gb')} GB, {machine.get('memory_available_gb')} GB available at the start",
        ),
        ("load", ", ".join(str(load) for load in machine.get("load_average", []))),
        ("system", f"{machine.get('system')}, Python {machine.get('python')}"),
        (
            "PyTorch",
            f"{machine.get('torch')}, MKL {_yes(machine.get('mkl'))}, oneDNN {_yes(machine.get('onednn'))}",
        ),
        ("versions", ", ".join(f"{name} {found}" for name, found in machine.get("versions", {}).items() if found)),
        (
            "xfm-fast",
            f"{machine.get('xfm_fast')}, commit {commit}{', with changes' if machine.get('dirty') else ''}",
        ),
    ]
    facts += [
        *_subject(content),
        *more,
        ("command", " ".join(content["command"])),
        ("duration", f"{content.get('duration_s', 0):.0f} s"),
    ]
    return f"<section><h2>Circumstances</h2>{facts_table(facts)}</section>"


def _subject(content: dict[str, Any]) -> list[tuple[str, str]]:
    facts = []
    if model := content.get("model"):
        facts.append(("model", f"{model['preset']}, {model['parameters'] / 1e6:.0f}M parameters, {model['origin']}"))
    if data := content.get("data"):
        facts.append(("data", f"{data['photos']} photographs, {data['captions']} captions: {data['origin']}"))
        facts.append(("tokenizer", f"{data['tokenizer']}, {data['vocabulary']} entries"))
    if cold := content.get("cold_start"):
        names = {
            "process_to_suite_s": "imports",
            "load_s": "weights",
            "first_image_s": "first image",
            "first_call_s": "first call",
        }
        split = ", ".join(f"{name} {cold[key]:.1f}" for key, name in names.items() if key in cold)
        facts.append(("cold start", f"{cold['total_s']:.1f} s: {split}"))
    return facts


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"


def skipped(content: dict[str, Any]) -> str:
    """Data that could not be used, with the reasons."""
    found = content.get("data", {}).get("skipped", [])
    if not found:
        return ""
    lines = "".join(
        f"<tr><td>{escape(str(entry['what']))}</td><td>{escape(str(entry['reason']))}</td></tr>" for entry in found
    )
    return section(f"Skipped ({len(found)})", "Data that could not be used.", f"<table><tbody>{lines}</tbody></table>")
