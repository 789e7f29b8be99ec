"""Search over HTTP: hits are those of `search`, pictures those of the index; and the page, in Chromium."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from tests.cli.runner import invoke
from tests.library_models import write_embedder
from tests.search.conftest import write_picture
from tests.serve.browser import Browser, Page, chromium
from tests.serve.conftest import Running, data_url, get, process, running, until
from xfm_fast.encoders import Encoder, open_encoder
from xfm_fast.errors import DataError
from xfm_fast.search import build_index, open_index, search

KEY = "of-gold"
MARKUP = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp; "quoted" \u202e\u05d0'
TEXTS = [
    ("a red circle above a blue star", "shapes"),
    ("two green squares", "shapes"),
    (MARKUP, "attack"),
    ("javascript:document.title=3", "attack"),
    ("a yellow triangle left of a circle", "shapes"),
]

Open = Callable[..., AbstractContextManager[Running]]


def start(model: Path, index: Path, **options: Any) -> AbstractContextManager[Running]:
    """Serve a model and an index."""
    from xfm_fast.serve import ServiceOptions, SourceOptions
    from xfm_fast.serve.server import open_service

    source = SourceOptions(model=str(model), device="cpu")
    settings = ServiceOptions(port=0, timeout=20, cache_mb=64, index=index, **options)
    return running(open_service(source, settings))


@pytest.fixture(scope="module")
def encoder(weights: Path) -> Encoder:
    return open_encoder(weights)


@pytest.fixture(scope="module")
def photos(weights: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write and index 30 pictures, whose names and captions attack a page that trusts them."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    names = [f"{'trip' if index % 2 else '.'}/{index}.png" for index in range(28)]
    names += ["trip/<b onclick=alert(1)>.png", "trip/'\"><svg onload=document.title=4>.png"]
    for index, name in enumerate(names):
        write_picture(folder / name, index)
        (folder / name).with_suffix(".txt").write_text(f"{MARKUP} {index}")
    build_index(folder, encoder)
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentence_transformers")
    return write_embedder(tmp_path_factory.mktemp("embedder") / "embedder")


@pytest.fixture(scope="module")
def table(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write and index a table of texts."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "topic"), *TEXTS])
    build_index(path, open_encoder(embedder))
    return path


@pytest.fixture(scope="module")
def gallery(weights: Path, photos: Path) -> Iterator[Running]:
    with start(weights, photos) as service:
        yield service


@pytest.fixture(scope="module")
def library(embedder: Path, table: Path) -> Iterator[Running]:
    with start(embedder, table) as service:
        yield service


@pytest.fixture(scope="module")
def locked(weights: Path, photos: Path) -> Iterator[Running]:
    with start(weights, photos, api_key=KEY) as service:
        yield service


def names(answer: Any) -> list[str]:
    return [hit["name"] for hit in answer["hits"]]


@pytest.mark.parametrize("path", [None, "trip/*", "nothing/*"])
def test_hits_of_a_text_are_those_of_search(
    gallery: Running, encoder: Encoder, photos: Path, path: str | None
) -> None:
    """X-FM re-ranks: the service gives the same hits and scores as `search` in this process."""
    answer = gallery.post("/search", {"query": "a red circle", "top": 9, "path": path}).json()
    index = open_index(photos)
    expected = search(index, encoder, "a red circle", top=9, glob=path).hits
    assert names(answer) == [hit.entry.name for hit in expected]
    assert len(expected) == (0 if path == "nothing/*" else 9)
    for hit, other in zip(answer["hits"], expected, strict=True):
        values = [hit[name] for name in ("row", "score", "similarity", "match")]
        others = [other.row, other.score, other.similarity, other.match]
        assert values == pytest.approx(others, abs=1e-5)
        assert hit["text"] == other.entry.caption
    assert answer["searched"] == 30
    assert answer["milliseconds"] > 0


def test_an_indexed_picture_finds_itself(gallery: Running, photos: Path) -> None:
    image = {"image": data_url((photos / "trip/7.png").read_bytes())}
    answer = gallery.post("/search", {"query": image, "top": 3}).json()
    assert names(answer)[0] == "trip/7.png"
    first = answer["hits"][0]
    assert first["similarity"] == pytest.approx(1, abs=1e-5)
    assert first["match"] is None
    assert len(answer["hits"]) == 3


def test_texts_of_any_model(library: Running, embedder: Path, table: Path) -> None:
    encoder, index = open_encoder(embedder), open_index(table)
    answer = library.post("/search", {"query": TEXTS[1][0]}).json()
    expected = search(index, encoder, TEXTS[1][0], top=24).hits
    assert [hit["text"] for hit in answer["hits"]] == [hit.entry.caption for hit in expected]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(
        [hit.score for hit in expected], abs=1e-5
    )
    answer = library.post("/search", {"query": "red", "where": {"topic": "attack"}}).json()
    assert {hit["text"] for hit in answer["hits"]} == {TEXTS[2][0], TEXTS[3][0]}
    assert all(hit["columns"] == {"topic": "attack"} for hit in answer["hits"])
    assert library.get("/search/index").json() == {
        "model": "embedder",
        "entries": len(TEXTS),
        "modality": "text",
        "queries": ["text"],
        "columns": ["topic"],
    }
    assert library.get("/search/picture/0").status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "query"),
        ({"query": ""}, ""),
        ({"query": "a", "top": 0}, "top"),
        ({"query": "a", "top": 1001}, "top"),
        ({"query": "a", "where": {"nothing": "b"}}, "nothing"),
        ({"query": "a", "where": ["b"]}, "where"),
        ({"query": "a", "path": 5}, "path"),
        ({"query": "a" * 32769}, "32,769"),
        ({"query": {"image": "data:image/png;base64,%%%"}}, "%%%"),
        ({"query": {"image": "http://169.254.169.254/latest"}}, "--allow-urls"),
        ({"query": "a\ud800"}, ""),
        ({"query": "a", "path": "\ud800"}, None),
        ({"query": "a", "path": "[" * 100}, None),
    ],
)
def test_bad_searches(gallery: Running, body: Any, message: str | None) -> None:
    reply = gallery.post("/search", body)
    assert reply.status_code == (200 if message is None else 422), reply.text
    assert (message or "") in reply.text
    assert gallery.post("/search", {"query": "a red circle"}).status_code == 200


def test_pictures_are_small_jpegs(gallery: Running, photos: Path) -> None:
    hits = gallery.post("/search", {"query": "a red circle"}).json()["hits"]
    Image.open(photos / hits[0]["name"]).resize((3000, 1500)).save(photos / hits[0]["name"])
    for large, width in (("false", 512), ("true", 2048)):
        reply = gallery.get(f"/search/picture/{hits[0]['row']}?large={large}")
        image = Image.open(io.BytesIO(reply.content))
        assert (image.format, image.size) == ("JPEG", (width, width // 2))
        assert reply.headers["content-type"] == "image/jpeg"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert until(lambda: gallery.service.ledger.used == 0)


def test_only_indexed_pictures_are_served(gallery: Running, photos: Path) -> None:
    """Refuse rows that do not exist, paths in place of rows, and files that became something else."""
    for row in ("-1", "30", "1e3", "x", "", str(1 << 63), "9" * 5000, "%00", "0?large=huge"):
        status = gallery.get(f"/search/picture/{row}").status_code
        assert status in (404, 422), row
    for path in ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "0/../../x", "trip/1.png"):
        assert gallery.get(f"/search/picture/{path}").status_code == 404, path
    hits = gallery.post("/search", {"query": "a star"}).json()["hits"]
    for hit, damage in zip(hits[-3:], (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", None), strict=True):
        file = photos / hit["name"]
        content = file.read_bytes()
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        assert gallery.get(f"/search/picture/{hit['row']}").status_code == 404
        file.write_bytes(content)


def test_an_index_from_anybody_shows_no_pictures(
    weights: Path, photos: Path, tmp_path: Path
) -> None:
    """A bare index names any path; its pictures are shown below `images` alone."""
    folder = photos / ".xfm-index"
    with start(weights, folder) as service:
        hits = service.post("/search", {"query": "a red circle"}).json()["hits"]
        assert len(hits) == 24
        assert hits[0]["match"] is None
        assert service.get(f"/search/picture/{hits[0]['row']}").status_code == 404
    with start(weights, folder, images=photos) as service:
        hits = service.post("/search", {"query": "a red circle"}).json()["hits"]
        assert hits[0]["match"] is not None
        assert service.get(f"/search/picture/{hits[0]['row']}").status_code == 200
    with start(weights, folder, images=tmp_path) as service:
        assert service.get(f"/search/picture/{hits[0]['row']}").status_code == 404


def test_the_model_must_be_that_of_the_index(embedder: Path, photos: Path, weights: Path) -> None:
    with pytest.raises(DataError, match="was made with"), start(embedder, photos):
        pass
    with pytest.raises(DataError, match="has no index"), start(weights, photos / "trip"):
        pass


@pytest.mark.slow
def test_the_command_serves_an_index(weights: Path, photos: Path) -> None:
    with process(weights, "--index", photos) as (_, port):
        assert get(port, "/search/index").json()["entries"] == 30
        assert get(port, "/").headers["content-type"].startswith("text/html")


def test_an_index_that_is_not_there_is_named(weights: Path, tmp_path: Path) -> None:
    done = invoke(["serve", weights, "--port", 0, "--device", "cpu", "--index", tmp_path / "none"])
    assert done.exit_code == 2
    assert f"{tmp_path / 'none'} does not exist" in done.stderr


def test_search_goes_through_the_gate(locked: Running) -> None:
    """The page is open and holds nothing; everything else needs the key, the right host and JSON."""
    bearer = {"authorization": f"Bearer {KEY}"}
    for path in ("/", "/search"):
        assert locked.get(path).status_code == 200
        assert locked.get(path, {"host": "evil.example"}).status_code == 403
    calls: list[Callable[..., Any]] = [
        lambda headers: locked.post("/search", {"query": "a circle"}, headers),
        lambda headers: locked.get("/search/index", headers),
        lambda headers: locked.get("/search/picture/0", headers),
    ]
    for call in calls:
        assert call({}).status_code == 401
        assert call({"authorization": "Bearer of-silver"}).status_code == 401
        assert call({**bearer, "host": "evil.example"}).status_code == 403
        assert call(bearer).status_code == 200
    text = {**bearer, "content-type": "text/plain"}
    assert locked.post("/search", {"query": "a circle"}, text).status_code == 415
    url = f"http://127.0.0.1:{locked.port}"
    assert httpx.post(f"{url}/", json={"inputs": "a"}).status_code == 401


def test_pictures_count_among_the_requests(weights: Path, photos: Path) -> None:
    """Pictures are refused above `max_queue`, and end with their client."""
    with start(weights, photos, max_queue=1) as service:
        gate, answer = threading.Event(), service.batcher.run
        service.batcher.run = lambda works: [gate.wait(20), answer(works)][1]
        thread = threading.Thread(target=service.post, args=("/search", {"query": "a circle"}))
        thread.start()
        assert until(lambda: len(service.service.active) == 1)
        reply = service.get("/search/picture/0")
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        gate.set()
        thread.join()
        assert service.get("/search/picture/0").status_code == 200
        assert until(lambda: service.service.ledger.used == 0)


def test_a_service_without_an_index_has_no_page(served: Running) -> None:
    assert served.get("/search").status_code == 404
    assert served.post("/search", {"query": "a"}).status_code == 404
    assert served.get("/search/picture/0").status_code == 404


def test_the_policy_allows_the_page_alone(gallery: Running) -> None:
    reply = gallery.get("/")
    policy = reply.headers["content-security-policy"]
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert not re.search(
        r"""(src|href)=["']?(https?:)?//|\son[a-z]+=|style=|innerHTML""", reply.text
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Open a page; at the end, no script failed and nothing was refused or asked of another host."""
    page = browser.page()
    yield page
    assert page.failures == []
    hosts = {urlsplit(url).hostname for url in page.requests if url.startswith("http")}
    assert hosts <= {"127.0.0.1"}


def visit(page: Page, service: Running, fragment: str = "", **window: Any) -> None:
    page.open(f"http://127.0.0.1:{service.port}/{fragment}", **window)
    page.wait("['empty', 'done', 'locked', 'error'].includes(document.body.dataset.state)")
    page.wait("index || document.body.dataset.state !== 'empty'")


def ask(page: Page, text: str) -> None:
    # The state of an earlier answer would look like that of this one.
    page.run("query.focus(); query.select(); document.body.dataset.state = 'asking'")
    page.write(text)
    page.press("Enter")
    page.wait("document.body.dataset.state === 'done'")


def test_markup_in_names_and_captions_stays_text(page: Page, gallery: Running) -> None:
    visit(page, gallery)
    title = page.run("document.title")
    ask(page, MARKUP)
    page.run("search(768)")
    page.wait("hits.children.length === 30")
    assert page.run("hits.querySelector('script, b, svg')") is None
    assert page.run("hits.querySelector('.name').textContent").startswith(MARKUP)
    page.run("hits.querySelector('.hit').click()")
    assert page.run("$('heading').textContent").startswith(MARKUP)
    assert page.run("large.querySelectorAll('#facts script, #facts b, #stage svg').length") == 0
    assert title == "Search"
    assert page.run("document.title") == f"{' '.join(MARKUP.split())} – Search"


def test_the_keyboard_leads_through_the_results(page: Page, gallery: Running) -> None:
    focus = "[...hits.querySelectorAll('.hit')].indexOf(document.activeElement)"
    visit(page, gallery)
    assert page.run("document.activeElement === query")
    ask(page, "a red circle")
    columns = page.run("getComputedStyle(hits).gridTemplateColumns.split(' ').length")
    assert page.run("hits.children.length") >= 24
    for key, index in (
        ("ArrowDown", 0),
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowLeft", columns),
        ("ArrowUp", 0),
        ("End", page.run("hits.children.length") - 1),
        ("Home", 0),
    ):
        page.press(key)
        assert page.run(focus) == index, key
    page.press("ArrowRight", "Enter")
    page.wait("large.open")
    assert page.run("$('heading').textContent") == page.run("results[1].text")
    page.press("ArrowRight")
    assert page.run("$('count').textContent").startswith("3 / ")
    page.wait("$('stage').querySelector('img').naturalWidth > 0")
    page.press("Escape")
    page.wait(f"!large.open && {focus} === 2")
    page.press("/")
    assert page.run("document.activeElement === query")
    assert page.run("query.value") == "a red circle"


def test_a_link_holds_the_query_and_the_filter(page: Page, gallery: Running) -> None:
    visit(page, gallery, "#q=a+red+circle&path=trip")
    page.wait("document.body.dataset.state === 'done'")
    assert page.run("query.value") == "a red circle"
    assert page.run("results.length > 0 && results.every(hit => hit.name.startsWith('trip/'))")
    assert page.run("!$('filters').hidden && $('filter').classList.contains('active')")
    ask(page, "a blue star")
    assert page.run("location.hash") == "#q=a+blue+star&path=trip"
    page.run("history.back()")
    page.wait("query.value === 'a red circle' && document.body.dataset.state === 'done'")
    assert page.run("document.title") == "a red circle – Search"


def test_a_pasted_picture_is_searched_by(page: Page, gallery: Running, photos: Path) -> None:
    visit(page, gallery)
    content = base64.b64encode((photos / "trip/9.png").read_bytes()).decode()
    page.run(
        f"""(async () => {{
          const bytes = Uint8Array.from(atob("{content}"), letter => letter.charCodeAt());
          const data = new DataTransfer();
          data.items.add(new File([bytes], "a.png", {{ type: "image/png" }}));
          const options = {{ clipboardData: data, bubbles: true, cancelable: true }};
          document.body.dispatchEvent(new ClipboardEvent("paste", options));
        }})()"""
    )
    page.wait("document.body.dataset.state === 'done'")
    assert page.run("results[0].name") == "trip/9.png"
    assert page.run("!$('sample').hidden && location.hash === ''")
    page.run("$('sample').click()")
    page.wait("document.body.dataset.state === 'empty'")
    page.run("history.back()")
    page.wait("document.body.dataset.state === 'done' && results[0].name === 'trip/9.png'")
    page.run("hits.querySelector('.hit').click(); $('similar').click()")
    page.wait("!large.open && document.body.dataset.state === 'done'")


def test_files_that_are_no_pictures_are_explained(page: Page, gallery: Running) -> None:
    visit(page, gallery)
    page.run("accept([new File(['x'], 'notes.pdf', { type: 'application/pdf' })])")
    page.wait("document.body.dataset.state === 'error'")
    assert "notes.pdf" in page.run("$('notice').innerText")


def test_texts_are_listed_and_read(page: Page, library: Running) -> None:
    visit(page, library)
    assert page.run("$('welcome').textContent") == "Search 5 texts"
    assert page.run("$('choose').hidden")
    ask(page, "green")
    assert page.run("hits.className") == "texts"
    assert sorted(page.run("results.map(hit => hit.text)")) == sorted(text for text, _ in TEXTS)
    shown = "[...hits.querySelectorAll('.text')].map(node => node.textContent)"
    assert page.run(shown) == page.run("results.map(hit => hit.text)")
    assert "topic: " in page.run("hits.querySelector('.meta').textContent")
    page.press("ArrowDown", "Enter")
    assert page.run("$('words').textContent") == page.run("results[0].text")
    page.press("Escape")
    page.run("$('filters').querySelector('[name=\"where.topic\"]').value = 'nothing'")
    ask(page, "green")
    assert "No entry passes the filter" in page.run("$('notice').innerText")


def test_the_page_asks_for_the_key_once(page: Page, locked: Running) -> None:
    visit(page, locked, "#q=a+red+circle")
    assert page.run("document.body.dataset.state") == "locked"
    assert page.run("document.activeElement.type") == "password"
    page.write("of-silver")
    page.press("Enter")
    page.wait("$('notice').innerText.includes('This key is wrong')")
    page.write(KEY)
    page.press("Enter")
    page.wait("document.body.dataset.state === 'done'")
    page.wait("hits.querySelector('img').naturalWidth > 0")
    assert page.run("hits.querySelector('img').src").startswith("blob:")
    assert KEY not in page.run("document.documentElement.outerHTML + location.href")
    visit(page, locked, "#q=a+blue+star")
    page.wait("document.body.dataset.state === 'done' && query.value === 'a blue star'")


def test_errors_are_explained(page: Page, weights: Path, photos: Path) -> None:
    with start(weights, photos, max_characters=5) as service:
        visit(page, service)
        page.write("too long a text")
        page.press("Enter")
        page.wait("document.body.dataset.state === 'error'")
        assert "--max-characters" in page.run("$('notice').innerText")
        ask(page, "star")
        assert page.run("$('notice').hidden")
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        page.send("Network.emulateNetworkConditions", offline=True, **speed)
        page.run("query.value = 'a'; $('form').requestSubmit()")
        page.wait("document.body.dataset.state === 'error'")
        assert "does not answer" in page.run("$('notice').innerText")
        page.send("Network.emulateNetworkConditions", offline=False, **speed)
        page.run("$('again').click()")
        page.wait("document.body.dataset.state === 'done'")


CONTRAST = """(() => {
  const channels = colour => {
    const context = document.createElement("canvas").getContext("2d");
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = colour => channels(colour).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "white";
  };
  const failures = [];
  for (const node of document.querySelectorAll("body *")) {
    const hasText = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!hasText || !node.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) failures.push([node.id || node.className || node.tagName, contrast]);
  }
  return failures;
})()"""


UNNAMED = """[...document.querySelectorAll('button, input:not([type=file])')]
  .filter(node => node.checkVisibility())
  .filter(node => !(node.ariaLabel || node.innerText || node.labels?.length))
  .map(node => node.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800), (3840, 2160)])
def test_every_window_is_readable(
    page: Page,
    gallery: Running,
    library: Running,
    tmp_path: Path,
    width: int,
    height: int,
    scheme: str,
) -> None:
    """Nothing is wider than the window, contrasts are at least 4.5, and every control has a name."""
    for service in (gallery, library):
        visit(page, service, width=width, height=height, scheme=scheme)
        states = ["", "$('filter').click()", "hits.querySelector('.hit').click()"]
        for index, script in enumerate(states):
            if index == 1:
                ask(page, "a red circle")
            page.run(f"{script}; getComputedStyle(document.body).opacity")
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run(CONTRAST) == []
            assert page.run(UNNAMED) == []
        page.screenshot(tmp_path / "page.png")
        picture = Image.open(tmp_path / "page.png").convert("L")
        assert picture.size == (width, height)
        shades = picture.tobytes()
        # Neither is the page empty, nor of the other scheme.
        assert max(shades) - min(shades) > 100
        assert (shades[0] > 128) == (scheme == "light")


def test_the_tree_of_accessibility_names_the_results(page: Page, gallery: Running) -> None:
    visit(page, gallery)
    ask(page, "a red circle")
    page.send("Accessibility.enable")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    assert ("search", "") in roles
    assert ("searchbox", "Search for") in roles
    assert ("list", "Results") in roles
    assert any(role == "status" for role, _ in roles)
    named = [name for role, name in roles if role == "button" and name.startswith(MARKUP[:20])]
    assert len(named) >= 24
