"""Files appear whole or not at all, and every failure is one sentence."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.core import files
from compress.core.errors import ArtifactError, ResourceError, UsageError
from compress.core.safetensors_layout import Entry, file_bytes, tensor_entry

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.odd": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "c.code": torch.tensor([[-1, 2]], dtype=torch.int8),
    "d.shape": torch.tensor([4, 5]),
    "e.empty": torch.empty(0, 4),
    "f.scalar": torch.tensor(7.0),
    "ü.flag": torch.tensor([True, False]),
}


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.atomic_write(target, "old")
    files.atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_failure_inside_atomic_file_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.atomic_write(target, "old")
    with pytest.raises(ValueError, match="boom"), files.atomic_file(target) as stream:
        stream.write(b"half")
        raise ValueError("boom")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_safetensors_is_read_by_the_real_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written = files.write_safetensors(path, TENSORS.items(), {"format": "pt"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert (
        written.bytes
        == path.stat().st_size
        == file_bytes([tensor_entry(name, tensor) for name, tensor in TENSORS.items()], {"format": "pt"})
    )
    assert written.sha256 == files.sha256_file(path)


def test_safetensors_bytes_do_not_depend_on_order_or_layout(tmp_path: Path) -> None:
    files.write_safetensors(tmp_path / "x", TENSORS.items())
    turned = {**dict(reversed(TENSORS.items())), "b.weight": TENSORS["b.weight"].t().contiguous().t()}
    files.write_safetensors(tmp_path / "y", turned.items())
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_safetensors_tensors_are_aligned_to_their_items(tmp_path: Path) -> None:
    from compress.core.safetensors_io import ITEM_BYTES, read_header

    files.write_safetensors(tmp_path / "x", TENSORS.items())
    assert all(info.start % ITEM_BYTES[info.dtype] == 0 for info in read_header(tmp_path / "x").values())


def test_safetensors_refuses_twins_and_wrong_sizes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'w' is given twice"):
        files.write_safetensors(tmp_path / "x", [("w", torch.ones(1)), ("w", torch.ones(1))])
    short = Entry("w", "F32", (2,), lambda: memoryview(b"1234"))
    with pytest.raises(ArtifactError, match="4 bytes where 8 were announced"):
        files.write_entries(tmp_path / "x", [short])
    assert os.listdir(tmp_path) == []


def test_append_and_truncate(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    files.append_durably(path, b"one\n")
    files.append_durably(path, b"two\n")
    files.truncate(path, 4)
    assert path.read_bytes() == b"one\n"


def test_make_folder_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the folder"):
        files.make_folder(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match="cannot make the folder"):
        files.make_folder(tmp_path / "file")


def test_link_shares_bytes_and_falls_back_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_text("data")
    for _ in range(2):  # the second time over the first link
        files.link_or_copy(source, tmp_path / "linked")
    assert os.path.samefile(source, tmp_path / "linked")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    files.link_or_copy(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "data"
    assert not os.path.samefile(source, tmp_path / "copied")
    assert sorted(os.listdir(tmp_path)) == ["copied", "linked", "source"]


def test_publish_refuses_an_existing_output_unless_replacing(tmp_path: Path) -> None:
    staged, final = tmp_path / "staged", tmp_path / "out"
    for folder, text in ((staged, "new"), (final, "old")):
        folder.mkdir()
        (folder / "f").write_text(text)
    with pytest.raises(UsageError, match="output exists"):
        files.publish_dir(staged, final)
    assert (final / "f").read_text() == "old"
    files.publish_dir(staged, final, replace=True)
    assert (final / "f").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", range(1, 6))
def test_a_replacement_that_fails_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    staged, final = tmp_path / "staged", tmp_path / "out"
    for folder, text in ((staged, "new"), (final, "old")):
        folder.mkdir()
        (folder / "f").write_text(text)
    count, sync = 0, os.fsync

    def fails_once(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(errno.EIO, "input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once)
    try:
        files.publish_dir(staged, final, replace=True)
    except ResourceError:
        assert (final / "f").read_text() == ("old" if (staged / "f").exists() else "new")
    else:
        assert (final / "f").read_text() == "new"


def test_a_replacement_that_was_cut_off_is_undone_or_completed(tmp_path: Path) -> None:
    aside, final = tmp_path / ".out.old", tmp_path / "out"
    aside.mkdir()
    files.recover_replaced(final)
    assert os.listdir(tmp_path) == ["out"]
    aside.mkdir()
    files.recover_replaced(final)
    assert os.listdir(tmp_path) == ["out"]


def test_remove_tree_never_follows_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    files.remove_tree(tree)
    files.remove_tree(tree)
    assert (outside / "precious").read_text() == "keep"


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, ResourceError, "the disk is full"),
        (errno.EDQUOT, ResourceError, "the disk is full"),
        (errno.EIO, ResourceError, "Input/output error"),
        (errno.EROFS, UsageError, "Read-only"),
        (errno.EACCES, UsageError, "Permission denied"),
    ],
)
def test_os_errors_become_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type, words: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    files.atomic_write(tmp_path / "x", "before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=words) as caught:
        files.atomic_write(tmp_path / "x", "after")
    assert caught.value.where == str(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "before"
    assert os.listdir(tmp_path) == ["x"]


def test_sha256_of_many_files(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    assert files.sha256_files(paths) == {path: files.sha256_file(path) for path in paths}


def test_free_bytes_of_a_folder_to_be_made(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "not" / "yet") > 0
