"""Loading from the hub, against a small hub on 127.0.0.1 that speaks what huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from compress.core.checkpoint import Checkpoint, Source
from compress.core.errors import InputError
from compress.core.hub import snapshot
from compress.core.places import locate
from tests.conftest import TinyModel

FIRST, SECOND = "1" * 40, "2" * 40


@dataclass
class Hub:
    """Repositories by name: commit -> file -> bytes. `status` makes all answers fail."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    branches: dict[str, str]
    gated: frozenset[str] = frozenset()
    status: int = 200
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        if self.status != 200:
            return self.status, {}, b""
        if name not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        rest = parts[4:] if api else parts[2:]
        commit = self.branches.get(rest[1], rest[1])
        if commit not in self.repositories[name]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if name in self.gated and not api:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        files = self.repositories[name][commit]
        if rest[0] == "revision":
            siblings = [{"rfilename": file} for file in files]
            return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        if rest[0] == "tree":
            return 200, {}, json.dumps([_entry(file, data) for file, data in files.items()]).encode()
        data = files.get("/".join(rest[2:]))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": commit}, data


def _digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _entry(file: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {urlsplit(self.path).path}")
        status, headers, body = self.hub.answer(self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def hub(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one good model in two commits, and some that are not."""
    files = {path.name: path.read_bytes() for path in tiny_model("llama").iterdir()}
    more = {"pytorch_model.bin": b"pickle", "modeling_x.py": b"code", "original/x.safetensors": b"x", "README.md": b"#"}
    repositories = {
        "someone/tiny": {FIRST: files | more, SECOND: files | more | {"NOTICE": b"second"}},
        "someone/pickled": {FIRST: {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"}},
        "someone/gated": {FIRST: files},
    }
    served = Hub(repositories, {"main": SECOND, "v1": FIRST}, frozenset({"someone/gated"}))
    served.repositories["someone/pickled"][SECOND] = repositories["someone/pickled"][FIRST]
    served.repositories["someone/gated"][SECOND] = files
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": served}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    server.shutdown()
    server.server_close()


def test_a_branch_is_pinned_to_its_commit_and_only_safe_files_come(hub: Hub) -> None:
    checkpoint = Checkpoint.open("someone/tiny")
    assert checkpoint.source == Source("someone/tiny", SECOND)
    assert checkpoint.num_blocks == 3
    files = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json NOTICE"
    assert {path.name for path in checkpoint.folder.rglob("*")} == set(files.split())
    assert not [line for line in hub.requests if line.endswith((".bin", ".py", ".md", "x.safetensors"))]


@pytest.mark.parametrize("revision", ["v1", FIRST])
def test_a_revision_is_taken_by_name_or_by_commit(hub: Hub, revision: str) -> None:
    folder, commit = snapshot("someone/tiny", revision=revision)
    assert commit == FIRST
    assert not (folder / "NOTICE").exists()


def test_offline_uses_the_cache_and_asks_nobody(hub: Hub) -> None:
    online = snapshot("someone/tiny")
    hub.requests.clear()
    assert snapshot("someone/tiny", offline=True) == online
    assert hub.requests == []


def test_a_branch_that_moved_is_followed_online_and_not_offline(hub: Hub) -> None:
    hub.branches["main"] = FIRST
    assert snapshot("someone/tiny")[1] == FIRST
    hub.branches["main"] = SECOND
    assert snapshot("someone/tiny", offline=True)[1] == FIRST
    assert snapshot("someone/tiny")[1] == SECOND


def test_offline_without_a_cached_model_is_refused(hub: Hub) -> None:
    with pytest.raises(InputError, match="someone/tiny: neither a folder here .* and the run is offline"):
        snapshot("someone/tiny", offline=True)
    assert hub.requests == []


REFUSED = {
    "missing": ("someone/absent", None, "neither a folder here nor a model of the hub"),
    "gated": ("someone/gated", None, r"only to people who accepted its terms.*hf auth login"),
    "no such revision": ("someone/tiny", "v9", "the hub has no revision 'v9' of this model"),
    "pickled": ("someone/pickled", None, "holds no safetensors weights; pickle files are never loaded"),
    "no possible id": ("some one/with space", None, "neither a folder here nor a possible id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_sentence(hub: Hub, case: str) -> None:
    model, revision, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refusal:
        snapshot(model, revision=revision)
    assert refusal.value.where == model
    assert "\n" not in str(refusal.value)


def test_a_hub_that_fails_is_named_with_what_it_said(hub: Hub) -> None:
    hub.status = 418
    with pytest.raises(InputError, match="status 418|cannot be reached") as refusal:
        snapshot("someone/tiny")
    assert "\n" not in str(refusal.value)


def test_a_hub_that_is_not_there_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="neither a folder here nor in the hub's cache, and the hub cannot be reached"):
        snapshot("someone/tiny")


def test_a_download_that_breaks_off_leaves_nothing_that_opens(hub: Hub) -> None:
    tree = hub.repositories["someone/tiny"][SECOND]
    whole = tree["model.safetensors"]
    del tree["model.safetensors"]
    listed = dict(tree) | {"model.safetensors": whole}
    honest = Hub.answer

    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        if "/tree/" in path:
            return 200, {}, json.dumps([_entry(file, data) for file, data in listed.items()]).encode()
        return honest(hub, path)

    hub.answer = answer
    with pytest.raises(InputError):
        Checkpoint.open("someone/tiny")
    with pytest.raises(InputError):
        Checkpoint.open("someone/tiny", offline=True)


def test_a_folder_is_recorded_by_its_name_and_the_bundled_model_as_demo(tiny_model, monkeypatch) -> None:
    folder = tiny_model("llama")
    assert Checkpoint.open(folder).source == Source(folder.name)
    monkeypatch.chdir(folder)
    assert Checkpoint.open(".").source == Source(folder.name)
    assert Checkpoint.open(locate("demo", "model", folder)).source == Source("demo")
