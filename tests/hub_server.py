"""A stand-in for the Hugging Face Hub's HTTP API: dataset repos with commits and branches, held in memory.

What `HfFileSystem` and `HfApi` need to read: repo info, tree, paths-info, and resolve with byte ranges; and
to write: creating a repo, large files ahead, a commit on top of a known one. Point a process at it by
`HF_ENDPOINT` (with `HF_HUB_OFFLINE=0`, and to write `HF_HUB_DISABLE_XET=1`) before `huggingface_hub` is
imported.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from http_servers import Handler


@dataclass
class Repo:
    """Commits by their sha (40 hex), newest last; a branch names one of them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make `files` the whole content of a branch; returns the commit's sha."""
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        sha = hashlib.sha1(f"{len(self.commits)}|{branch}|{content}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


_INFO = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?")
_TREE = re.compile(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?")
_PATHS = re.compile(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)")
_WRITE = re.compile(r"/api/datasets/([^/]+/[^/]+)/(preupload|commit)/([^/]+)")
_BATCH = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_FILE = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class HubHandler(Handler):
    """Serves `repos` (by `owner/name`); counts requests by kind in `asked`."""

    repos: dict[str, Repo]
    asked: Counter[str]
    large: dict[str, bytes]
    """Large files by their sha256, uploaded or committed."""
    before_upload: Callable[[], None] | None = None
    """Called at every upload of a large file: may wait, or raise to break the connection off."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        for kind, pattern in (("tree", _TREE), ("file", _FILE), ("info", _INFO)):
            if found := pattern.fullmatch(path):
                self.asked[kind] += 1
                name, revision, *rest = (unquote(g) if g else "" for g in found.groups())
                self._in_repo(kind, name, revision or "main", rest[0] if rest else "")
                return
        self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        if found := _WRITE.fullmatch(path):
            self._write(found[2], unquote(found[1]), unquote(found[3]), body)
            return
        if found := _BATCH.fullmatch(path):
            self._batch(json.loads(body)["objects"])
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
            return
        if path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
            return
        found = _PATHS.fullmatch(path)
        if not found:
            self.answer(404)
            return
        self.asked["paths-info"] += 1
        sha = self._commit(unquote(found[1]), unquote(found[2]))
        if sha is not None:
            files = self.repos[unquote(found[1])].commits[sha]
            asked = json.loads(body)["paths"]
            self.answer_json([_entry(p, files[p]) for p in asked if p in files])

    def do_PUT(self) -> None:
        if self.before_upload:
            self.before_upload()
        data = self._body()
        self.asked["upload"] += 1
        right = hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        if right:
            self.large[self.path.rpartition("/")[2]] = data
        self.answer(200 if right else 400)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repos:
            self.answer(409)
            return
        self.repos[name] = Repo(private=wanted.get("visibility") == "private")
        self.repos[name].commit({".gitattributes": b"*.arrow filter=lfs"})
        self.answer_json({"url": self._page(name)})

    def _page(self, name: str) -> str:
        return f"http://{self.headers['Host']}/datasets/{name}"

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        """How to upload large files: not at all, where they are here."""
        host, answers = self.headers["Host"], []
        for thing in objects:
            answers.append({"oid": thing["oid"], "size": thing["size"]})
            if thing["oid"] not in self.large:
                answers[-1]["actions"] = {"upload": {"href": f"http://{host}/large/{thing['oid']}"}}
        self.answer_json({"transfer": "basic", "objects": answers})

    def _write(self, kind: str, name: str, branch: str, body: bytes) -> None:
        sha = self._commit(name, branch)
        if sha is None:
            return
        if kind == "preupload":
            modes = [(f["path"], _mode(f["path"])) for f in json.loads(body)["files"]]
            self.answer_json(
                {
                    "files": [
                        {"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes
                    ]
                }
            )
            return
        files = dict(self.repos[name].commits[sha])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", sha) != sha:
                self.answer(412, X_Error_Message="A commit has happened since")
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made = self.repos[name].commit(files, branch)
        self.answer_json({"commitUrl": f"{self._page(name)}/commit/{made}", "commitOid": made})

    def answer_json(self, data: Any) -> None:
        self.answer(200, json.dumps(data).encode(), Content_Type="application/json")

    def _commit(self, name: str, revision: str) -> str | None:
        """The commit of a revision; None where it was answered that there is none."""
        repo = self.repos.get(name)
        sha = repo.find(revision) if repo else None
        if repo is None:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif sha is None:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Revision not found")
        return sha

    def _in_repo(self, kind: str, name: str, revision: str, path: str) -> None:
        sha = self._commit(name, revision)
        if sha is None:
            return
        files = self.repos[name].commits[sha]
        if kind == "info":
            siblings = [{"rfilename": p} for p in files]
            self.answer_json({"id": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})
        elif kind == "tree":
            inside = f"{path}/" if path else ""
            self.answer_json([_entry(p, d) for p, d in files.items() if p.startswith(inside)])
        elif path in files:
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.answer_file(files[path], ETag=etag, X_Repo_Commit=sha)
        else:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if _mode(path) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 128}
    return entry


def _mode(path: str) -> str:
    """How a file is kept: `.gitattributes` of the hub's dataset repos says which are large."""
    return "lfs" if path.endswith((".arrow", ".safetensors")) else "regular"
