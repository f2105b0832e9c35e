"""Doctor says what is there, and exits 6 when something needed is not."""

import sys
from pathlib import Path

import pytest

from compress import doctor


def test_a_sound_machine_passes(call) -> None:
    called = call("doctor")
    assert called.code == 0, called.err
    for words in ("compress", "methods", "gptq", "torch", "cpu", "gpu", "memory", "disk", "downloads"):
        assert words in called.out
    objects = call("doctor", "--json").objects
    assert objects[-1]["event"] == "summary"
    assert {item["name"] for item in objects[:-1]} >= {"torch", "memory", "disk"}


def test_a_stranger_of_our_name_is_exit_6_with_both_paths(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quantize", raising=False)
    called = call("run", "--recipe", "demo-w4")
    assert called.code == 6
    assert f"{tmp_path}/quantize" in called.err
    assert "instead of" in called.err
    monkeypatch.undo()
    assert call("doctor").code == 0


def test_a_missing_library_is_exit_6(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LIBRARIES", ("torch", "not-there-at-all"))
    called = call("doctor")
    assert called.code == 6
    assert "pip install not-there-at-all" in called.err


def test_little_memory_is_said_but_is_no_failure(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LITTLE_MEMORY", 1 << 60)
    called = call("doctor")
    assert called.code == 0
    assert "close other programs" in called.err
