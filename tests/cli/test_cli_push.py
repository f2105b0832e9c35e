"""Push: verified first, listed in a dry run, private by default; tested against a hub served on 127.0.0.1."""

import base64
import json
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

RECIPE = "model: no/model\nstages:\n  - quantize: {method: rtn, scheme: w8a16, group_size: 32}\n"


class Hub(ThreadingHTTPServer):
    """Enough of the hub's API to create a repository and commit files; remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuse = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        if self.server.refuse:
            self._answer({"error": "forbidden"}, 403)
        elif self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.address}/me/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            self._answer({"commitUrl": f"{self.server.address}/me/model/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({"type": "model"})

    def _chunks(self) -> bytes:
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _answer(self, data: dict[str, Any], status: int = 200) -> None:
        raw = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def artifact(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    (folder / "recipe.yaml").write_text(RECIPE)
    from compress.core.recipe import load_recipe
    from compress.pipeline import RunOptions, run

    return run(
        load_recipe(folder / "recipe.yaml", model=str(tiny_model("llama"))), RunOptions(output=folder / "a")
    ).artifact


@pytest.fixture
def push(hub: Hub, call, monkeypatch: pytest.MonkeyPatch):
    """The command, with its hub on this machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return lambda *arguments: call("push", *arguments)


def is_private(repository: dict[str, Any]) -> bool:
    """Whether a request to create a repository asks for a private one, in either wording of the hub's clients."""
    return repository.get("private") is True or repository.get("visibility") == "private"


def test_a_dry_run_lists_files_and_sends_nothing(hub: Hub, push, artifact: Path) -> None:
    done = push(artifact, "me/model", "--dry-run")
    assert done.code == 0, done.err
    for path in artifact.iterdir():
        assert path.name in done.out
    assert "nothing was sent" in done.out and "private" in done.out
    assert hub.created == [] and hub.files == {}


def test_what_is_uploaded_is_the_artifact_and_nothing_else(hub: Hub, push, artifact: Path) -> None:
    (artifact.parent / "a.report").mkdir(exist_ok=True)
    done = push(artifact, "me/model")
    assert done.code == 0, done.err
    assert [repo["name"] for repo in hub.created] == ["model"]
    assert is_private(hub.created[0])
    assert hub.files == {path.name: path.read_bytes() for path in artifact.iterdir()}
    assert hub.address in done.out
    card = hub.files["README.md"].decode()
    assert "llama-plain-float32" in card, "the card names what the artifact was made from"


def test_public_has_to_be_asked_for(hub: Hub, push, artifact: Path) -> None:
    assert push(artifact, "me/model", "--public").code == 0
    assert not is_private(hub.created[0])


def test_a_refusal_of_the_hub_is_one_sentence(hub: Hub, push, artifact: Path) -> None:
    hub.refuse = True
    done = push(artifact, "me/model")
    assert done.code == 3, done.err
    assert "the hub refuses the upload" in done.err
    assert "hf auth login" in done.err
    assert "Traceback" not in done.err
    assert "hf_test" not in done.err, "the token is no part of any message"


def test_what_does_not_verify_is_not_uploaded(hub: Hub, push, artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(artifact), str(broken)], check=True)
    with open(broken / "config.json", "a") as file:
        file.write(" ")
    done = push(broken, "me/model")
    assert done.code == 3
    assert "does not verify and is not uploaded" in done.err
    assert hub.created == []


def test_a_folder_of_somebody_else_is_refused(push, tiny_model) -> None:
    done = push(tiny_model("llama"), "me/model", "--dry-run")
    assert done.code == 3
    assert "no artifact of ours" in done.err
