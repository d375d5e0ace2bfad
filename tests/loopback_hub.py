"""A Hugging Face Hub on 127.0.0.1: what the real client needs to create a repository, upload to it and load from it.

    with LoopbackHub(folder) as hub: ...            # hub.environment() is what a client's process needs

Commits hold whole file lists; contents lie once, by their sha256. Files from `LFS_BYTES` on take the LFS way. Writing
needs the token `TOKEN`. A `Fault` makes requests of a kind fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER, TOKEN = "tester", "hf_thetokenofthetests"
LFS_BYTES = 4096
MAIN = (None, "main", "HEAD", "refs/heads/main")


@dataclass
class Fault:
    """Requests whose `METHOD path` matches get `status`, or no answer at all where it is 0."""

    pattern: str
    status: int


@dataclass
class Commit:
    """A revision: every path with the sha256 of its contents."""

    oid: str
    title: str
    files: dict[str, str]


@dataclass
class Store:
    """All that the Hub holds."""

    root: Path
    repositories: dict[str, list[Commit]] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def put(self, content: bytes) -> str:
        """Keep `content`; its sha256."""
        sha = hashlib.sha256(content).hexdigest()
        (self.root / sha).write_bytes(content)
        return sha

    def content(self, sha: str) -> bytes:
        return (self.root / sha).read_bytes()

    def has(self, sha: str) -> bool:
        return (self.root / sha).exists()

    def etag(self, sha: str) -> str:
        """As the Hub names a file: sha256 of an LFS object, else git's name of the blob."""
        if sha in self.large:
            return sha
        content = self.content(sha)
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def commit(self, repository: str, title: str, files: dict[str, str]) -> Commit:
        commits = self.repositories[repository]
        oid = hashlib.sha1(f"{repository} {len(commits)} {sorted(files.items())}".encode()).hexdigest()
        commits.append(Commit(oid, title, files))
        return commits[-1]

    def revision(self, repository: str, name: str | None) -> Commit | None:
        commits = self.repositories[repository]
        return commits[-1] if name in MAIN else next((c for c in commits if c.oid == name), None)

    def files(self, repository: str) -> dict[str, bytes]:
        """The newest contents, by path."""
        return {path: self.content(sha) for path, sha in self.repositories[repository][-1].files.items()}


class HubError(Exception):
    """An answer that is an error of the Hub."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """One request. Routes are the methods below, found by `ROUTES`."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: Any) -> None:
        """Nothing: pytest shows what matters."""

    def answer(self) -> None:
        body = self.body()
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.store.requests.append(request)
        if (fault := self.fault(request)) is not None:
            if fault.status:
                self.send(fault.status, {"error": "the server broke"})
            self.close_connection = True
            return
        for pattern, route in ROUTES:
            if match := re.fullmatch(pattern, request):
                try:
                    route(self, body, **match.groupdict())
                except HubError as error:
                    self.send(error.status, {"error": str(error)}, X_Error_Code=error.code, X_Error_Message=str(error))
                return
        self.send(404, {"error": f"no route for {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def fault(self, request: str) -> Fault | None:
        for fault in self.store.faults:
            if re.search(fault.pattern, request):
                return fault
        return None

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: Any = b"", kind: str = "application/json", **headers: Any) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def needs_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "", "Invalid username or password.")

    def revision(self, repository: str, name: str | None) -> Commit:
        if repository not in self.store.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        if (found := self.store.revision(repository, name)) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return found

    # ------------------------------------------------------------------ routes

    def whoami(self, body: bytes) -> None:
        self.needs_token()
        self.send(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body: bytes) -> None:
        self.needs_token()
        asked = json.loads(body)
        repository = f"{asked.get('organization') or USER}/{asked['name']}"
        exists = repository in self.store.repositories
        if not exists:
            self.store.repositories[repository] = []
            self.store.commit(repository, "initial commit", {".gitattributes": self.store.put(b"")})
        self.send(409 if exists else 200, {"url": f"{self.base}/{repository}", "name": repository, "id": repository})

    def validate_yaml(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repository: str, revision: str) -> None:
        self.needs_token()
        self.revision(repository, revision)
        modes = [(f["path"], "lfs" if f["size"] >= LFS_BYTES else "regular") for f in json.loads(body)["files"]]
        self.send(200, {"files": [{"path": p, "shouldIgnore": False, "uploadMode": mode} for p, mode in modes]})

    def lfs_batch(self, body: bytes, repository: str) -> None:
        self.needs_token()
        objects = []
        for asked in json.loads(body)["objects"]:
            known = {"oid": asked["oid"], "size": asked["size"]}
            upload = {"href": f"{self.base}/_lfs/{asked['oid']}", "header": {}}
            verify = {"href": f"{self.base}/_lfs/verify", "header": {}}
            missing = not self.store.has(asked["oid"])
            objects.append({**known, "actions": {"upload": upload, "verify": verify}} if missing else known)
        self.send(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(422, "", "sha256 mismatch")
        self.store.put(body)
        self.send(200, {})

    def lfs_verify(self, body: bytes) -> None:
        self.send(200 if self.store.has(json.loads(body)["oid"]) else 404, {})

    def commit(self, body: bytes, repository: str, revision: str) -> None:
        self.needs_token()
        files, title = dict(self.revision(repository, revision).files), ""
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = self.store.put(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                self.store.large.add(value["oid"])
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        oid = self.store.commit(repository, title, files).oid
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.base}/{repository}/commit/{oid}"})

    def info(self, body: bytes, repository: str, revision: str | None = None) -> None:
        found = self.revision(repository, revision)
        facts = {"id": repository, "modelId": repository, "sha": found.oid, "private": False, "tags": []}
        self.send(200, {**facts, "siblings": [{"rfilename": path} for path in found.files]})

    def tree(self, body: bytes, repository: str, revision: str, folder: str | None = None) -> None:
        found = self.revision(repository, revision)
        start = f"{folder}/" if folder else ""
        self.send(200, [self._entry(p, sha) for p, sha in sorted(found.files.items()) if p.startswith(start)])

    def _entry(self, path: str, sha: str) -> dict[str, Any]:
        size = len(self.store.content(sha))
        lfs = {"lfs": {"oid": sha, "size": size, "pointerSize": 134}} if sha in self.store.large else {}
        return {"type": "file", "path": path, "size": size, "oid": self.store.etag(sha), **lfs}

    def resolve(self, body: bytes, repository: str, revision: str, path: str) -> None:
        found = self.revision(repository, revision)
        if path not in found.files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        sha = found.files[path]
        content = self.store.content(sha)
        facts = {"X_Repo_Commit": found.oid, "ETag": f'"{self.store.etag(sha)}"', "X_Linked_Size": len(content)}
        self.send(200, content, "application/octet-stream", **facts)


_REPO, _REVISION = r"(?P<repository>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate_yaml),
    (f"POST /api/models/{_REPO}/preupload/{_REVISION}", Handler.preupload),
    (f"POST /api/models/{_REPO}/commit/{_REVISION}", Handler.commit),
    (f"GET /api/models/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    (f"(?:GET|HEAD) /api/models/{_REPO}/revision/{_REVISION}", Handler.info),
    (f"(?:GET|HEAD) /api/models/{_REPO}", Handler.info),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT /_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST /_lfs/verify", Handler.lfs_verify),
    (f"(?:GET|HEAD) /{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]


class LoopbackHub:
    """The server in a thread, its store under `root`."""

    def __init__(self, root: Path):
        root.mkdir(parents=True, exist_ok=True)
        self.store = Store(root)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"store": self.store}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path, token: str = TOKEN) -> dict[str, str]:
        """Variables of a process that talks to this Hub; huggingface_hub reads them when it is imported."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
