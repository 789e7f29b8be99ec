"""The pages in a real browser: nothing complains, nothing overflows or is cut off, charts are drawn, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.report import examples
from xfm_fast.benchmarks import files, report

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
STORED = {"images": "embed-image-cpu-amx-2threads", "operations": "kernels-cpu-amx-2threads"}
WIDTHS = (390, 768, 1280)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")

# Frames have the widths of a phone, a tablet and a desk; what each finds in itself is left in an element for the test.
HARNESS = """<!doctype html><meta charset="utf-8"><title>harness</title><body><script>
const pages = PAGES, found = [], errors = [];
const luminance = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05); };
const look = (name, width, frame) => {
  const doc = frame.contentDocument, view = frame.contentWindow, root = doc.documentElement;
  const ground = element => { for (let e = element; e; e = e.parentElement) {
    const c = view.getComputedStyle(e).backgroundColor; if (c !== "rgba(0, 0, 0, 0)") return c; }
    return "rgb(255,255,255)"; };
  const out = { name, width, dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    ground: view.getComputedStyle(doc.body).backgroundColor, overflow: root.scrollWidth - root.clientWidth,
    charts: 0, empty: [], cut: [], small: [], faint: [], colliding: [], broken: [] };
  for (const svg of doc.querySelectorAll("svg[role=img]")) {
    out.charts += 1;
    const box = svg.getBoundingClientRect(), label = svg.getAttribute("aria-label");
    if (box.width < 100 || box.height < 20 || !svg.querySelector("rect,circle,path,polyline")) out.empty.push(label);
    const texts = [...svg.querySelectorAll("text")];
    for (const text of texts) {
      const t = text.getBoundingClientRect();
      if (t.left < box.left - 1 || t.right > box.right + 1 || t.top < box.top - 2 || t.bottom > box.bottom + 2)
        out.cut.push(label + ": " + text.textContent);
      const size = parseFloat(view.getComputedStyle(text).fontSize);
      if (size < 11) out.small.push(label + ": " + text.textContent + " " + size.toFixed(1));
      if (contrast(view.getComputedStyle(text).fill, ground(svg)) < 4.5)
        out.faint.push(text.textContent);
    }
    for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
      const a = texts[i].getBoundingClientRect(), b = texts[j].getBoundingClientRect();
      const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (w > 2 && h > 4) out.colliding.push(label + ": " + texts[i].textContent + " / " + texts[j].textContent);
    }
    for (const bar of svg.querySelectorAll(".bar"))
      if (bar.getBoundingClientRect().width < 2) out.empty.push(label);
    for (const mark of svg.querySelectorAll(".bar, .mark:not(.hollow)"))
      if (contrast(view.getComputedStyle(mark).fill, ground(svg)) < 3) { out.faint.push(label + ": a mark"); break; }
  }
  const words = "h1, h2, h3, p, td, th, li, dt, dd, figcaption, small, footer, .tile b, .tile strong, .tile span";
  for (const e of doc.querySelectorAll(words))
    if (e.textContent && contrast(view.getComputedStyle(e).color, ground(e)) < 4.5) out.faint.push(e.textContent);
  for (const e of doc.querySelectorAll("section, .tile, .tile *, p, h1, h2, h3, figure, .wide, dl, dt, dd, li"))
    if (e.getBoundingClientRect().right > width + 1 ||
        !e.matches(".wide, .tile *") && e.scrollWidth > e.clientWidth + 1)
      out.cut.push(e.tagName + ": " + e.textContent.slice(0, 60));
  // A word that is broken leaves a cell with more lines than words.
  for (const e of doc.querySelectorAll("dt, dd, td, th, strong, figcaption")) {
    const range = doc.createRange(); range.selectNodeContents(e);
    const lines = new Set([...range.getClientRects()].map(r => Math.round(r.top))).size;
    if (lines > e.textContent.trim().split(/[\\s\\/-]+/).length) out.broken.push(e.textContent.slice(0, 60));
  }
  for (const e of doc.querySelectorAll("dd")) if (e.getBoundingClientRect().width < 200) out.broken.push(e.textContent);
  found.push(out);
};
window.addEventListener("error", event => errors.push(String(event.message)));
const jobs = [];
for (const [name, text] of Object.entries(pages)) for (const width of WIDTHS) jobs.push(new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0;color-scheme:inherit`;
  frame.onload = () => { try { look(name, width, frame); } catch (error) { errors.push(String(error)); } done(); };
  frame.srcdoc = text; document.body.append(frame);
}));
Promise.all(jobs).then(() => { const out = document.createElement("pre"); out.id = "found";
  out.textContent = JSON.stringify({ found, errors }); document.body.replaceChildren(out); });
</script>"""


def _pages() -> dict[str, str]:
    documents = {name: make() for name, make in examples.DOCUMENTS.items()}
    documents |= {name: files.load(RESULTS / f"{file}.json") for name, file in STORED.items()}
    return {name: report.html(document) for name, document in documents.items()}


def _browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    command += [f"--user-data-dir={folder}", "--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp(f"browser-{request.param}")
    page = folder / "harness.html"
    embedded = json.dumps(_pages()).replace("</", "<\\/")
    page.write_text(HARNESS.replace("WIDTHS", str(list(WIDTHS))).replace("PAGES", embedded, 1), encoding="utf-8")
    # 0 is dark and 1 is light in Blink's settings.
    scheme = f"--blink-settings=preferredColorScheme={0 if request.param == 'dark' else 1}"
    done = _browse(page, folder / "profile", scheme, "--virtual-time-budget=20000", "--dump-dom")
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert match, done.stderr[-2000:]
    return request.param, json.loads(html.unescape(match.group(1))), done.stderr


def test_nothing_complains(seen: tuple[str, dict[str, Any], str]) -> None:
    _, report, log = seen
    assert report["errors"] == []
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []


def test_every_width_and_scheme_was_seen(seen: tuple[str, dict[str, Any], str]) -> None:
    scheme, report, _ = seen
    assert sorted((one["name"], one["width"]) for one in report["found"]) == sorted(
        (name, width) for name in (*examples.DOCUMENTS, *STORED) for width in WIDTHS
    )
    grounds = {one["ground"] for one in report["found"]}
    assert {one["dark"] for one in report["found"]} == {scheme == "dark"}
    assert grounds == {"rgb(20, 23, 26)" if scheme == "dark" else "rgb(251, 251, 250)"}


def test_charts_are_drawn(seen: tuple[str, dict[str, Any], str]) -> None:
    # Speeds in each type, latencies, arrivals, roofs; memory of a step.
    charts = {"scenario": 18 + 3 + 3 + 2, "coco": 1, "train-step": 2 + 1, "drop-in": 4, "suite": 4}
    charts |= {"vqa": 2, "serve": 1, "kernels": 2, "operations": 15, "images": 4 + 1 + 2}
    for one in seen[1]["found"]:
        assert one["empty"] == []
        assert one["charts"] >= charts[one["name"]], one["name"]


def test_nothing_overflows_or_is_cut_off(seen: tuple[str, dict[str, Any], str]) -> None:
    for one in seen[1]["found"]:
        where = (one["name"], one["width"])
        assert one["overflow"] <= 0, where
        assert one["cut"] == [], where
        assert one["colliding"] == [], where
        assert one["broken"] == [], where


def test_words_are_large_and_dark_enough(seen: tuple[str, dict[str, Any], str]) -> None:
    for one in seen[1]["found"]:
        assert one["small"] == [], (one["name"], one["width"])
        assert one["faint"] == [], (one["name"], one["width"])


def test_a_screenshot_holds_more_than_a_ground(tmp_path: Path) -> None:
    from PIL import Image

    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(report.html(examples.scenarios()), encoding="utf-8")
    _browse(page, tmp_path / "profile", "--window-size=1200,4000", f"--screenshot={picture}")
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    # xfm-fast is dark, and others are grey.
    assert {(11, 93, 82), (138, 146, 155)} <= {colour for _, colour in colours}
