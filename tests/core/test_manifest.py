"""The manifest is canonical, comes back as it was, and lies in it are named."""

import json
from pathlib import Path

import pytest

from compress.core.artifact import open_artifact
from compress.core.errors import ArtifactError
from compress.core.manifest import Coverage, FileRecord, Manifest


def sample(turn: int = 1) -> Manifest:
    return Manifest(
        version="1",
        files=(FileRecord("a", 1, "0" * 64), FileRecord("b/ü", 2, "1" * 64))[::turn],
        recipe={"model": "m", "stages": []} if turn == 1 else {"stages": [], "model": "m"},
        fingerprint={"threads": 1},
        lineage={"id": "m"},
        coverage=(Coverage("x", "kept"), Coverage("y", "dropped", "tied"))[::turn],
    )


def test_text_is_canonical_and_comes_back() -> None:
    text = sample().text()
    assert text == sample(-1).text()
    assert text.endswith("}\n")
    assert Manifest.parse(text) == sample()
    assert Manifest.parse(text).text() == text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema_version", 2, "schema_version 2 is not understood"),
        ("schema_version", "1", "schema_version '1'"),
        ("files", {}, "files must be a list"),
        ("files", [{"path": "a", "size": -1, "sha256": ""}], "an entry of files"),
        ("files", [{"path": "a", "size": "1", "sha256": ""}], "an entry of files"),
        ("files", [{"path": "../a", "size": 1, "sha256": ""}], "leads out of the folder"),
        ("files", [{"path": "/etc/passwd", "size": 1, "sha256": ""}], "leads out of the folder"),
        ("files", [{"path": "a//b", "size": 1, "sha256": ""}], "leads out of the folder"),
        ("coverage", [{"tensor": "x", "status": "lost", "reason": ""}], "an entry of coverage"),
        ("recipe", [], "recipe must be an object"),
        ("stages", None, "stages must be a list"),
    ],
)
def test_lies_are_named(key: str, value: object, words: str) -> None:
    data = json.loads(sample().text())
    data[key] = value
    with pytest.raises(ArtifactError, match=words):
        Manifest.parse(json.dumps(data))


def test_a_missing_key_is_named() -> None:
    data = json.loads(sample().text())
    del data["lineage"]
    with pytest.raises(ArtifactError, match="'lineage' is missing"):
        Manifest.parse(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": NaN}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(ArtifactError, match="not (a )?JSON"):
        Manifest.parse(text)


def test_open_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact of ours"):
        open_artifact(tmp_path)
    (tmp_path / "compress.json").write_text(sample().text())
    with pytest.raises(ArtifactError, match=r"config.json: cannot be read"):
        open_artifact(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    artifact = open_artifact(tmp_path)
    assert artifact.manifest == sample()
    assert artifact.config["model_type"] == "llama"
