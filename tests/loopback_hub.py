"""A Hugging Face Hub on this machine: serves folders as the newest revisions of models."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_COMMIT = "c" * 40


@contextmanager
def serving(models: Mapping[str, Path]) -> Iterator[str]:
    """Serve folders by the names of their models; yields the address."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
            name = next((name for name in models if f"{path}/".startswith(f"{name}/")), None)
            content, status, fault = b"", 404, "RepoNotFound"
            if name is not None:
                folder, fault = models[name], "EntryNotFound"
                kind, _, file = path.removeprefix(name).lstrip("/").partition("/")
                file = file.partition("/")[2]
                if kind == "resolve" and (folder / file).is_file():
                    content, status = (folder / file).read_bytes(), 200
                elif kind in ("", "revision") or (kind == "tree" and not file):
                    files = {
                        part.relative_to(folder).as_posix(): part.stat().st_size
                        for part in folder.rglob("*")
                        if part.is_file()
                    }
                    siblings = [{"rfilename": part} for part in files]
                    listed: object = {"id": name, "sha": _COMMIT, "siblings": siblings}
                    if kind == "tree":
                        entry = {"type": "file", "oid": _COMMIT}
                        listed = [{**entry, "path": part, "size": files[part]} for part in files]
                    content, status = json.dumps(listed).encode(), 200
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", fault)
            self.send_header("X-Repo-Commit", _COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
