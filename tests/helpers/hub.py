"""A Hugging Face hub on the loopback: as much of its HTTP as downloads and uploads of models take."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_somebody"


@dataclass
class Hub:
    """What lies there, and what was asked of it.

    Attributes:
        address: for `HF_ENDPOINT`.
        files: content by repository and name.
        gated: repositories that want a token.
        created: repositories by name, with the body of the request.
        requests: method and path of each.
    """

    address: str = ""
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def hub() -> Iterator[Hub]:
    """One that answers until the end of the block."""
    there = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", headers.get("length", str(len(body))))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def as_json(self, content: Any) -> None:
            self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                whole = b""
                while count := int(self.rfile.readline(), 16):
                    whole += self.rfile.read(count)
                    self.rfile.readline()
                self.rfile.readline()
                return whole
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def may(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def do_HEAD(self) -> None:
            there.requests.append(f"{self.command} {self.path}")
            if "/resolve/" not in self.path:
                self.answer(404)
                return
            repo, _, rest = self.path.removeprefix("/").partition("/resolve/")
            revision, _, name = unquote(rest).partition("/")
            if not any(repo == known for known, _ in there.files):
                self.answer(404, X_Error_Code="RepoNotFound")
            elif repo in there.gated and not self.may():
                self.answer(403, X_Error_Code="GatedRepo")
            elif revision not in ("main", COMMIT):
                self.answer(404, X_Error_Code="RevisionNotFound", X_Repo_Commit=COMMIT)
            elif (repo, name) not in there.files:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                content = there.files[repo, name]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)

        do_GET = do_HEAD

        def do_POST(self) -> None:
            there.requests.append(f"{self.command} {self.path}")
            body = self.body()
            if not self.may():
                self.answer(401, json.dumps({"error": "Invalid username or password."}).encode())
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                there.created[name] = asked
                self.as_json({"url": f"{there.address}/{name}", "name": name})
            elif self.path == "/api/validate-yaml":
                self.as_json({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self.as_json({"files": [{"path": name, **plain} for name in names]})
            elif "/commit/" in self.path:
                repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        there.files[repo, line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                url = f"{there.address}/{repo}/commit/{COMMIT}"
                self.as_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
            else:
                self.answer(404)

        def log_message(self, *arguments: Any) -> None:
            """Nothing: `requests` says it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield there
    finally:
        server.shutdown()
        server.server_close()
