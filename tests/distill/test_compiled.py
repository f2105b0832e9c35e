"""Compiled blocks: they train as the others do, and a run that was killed goes on to the bit.

By default blocks are traced into the graphs that are compiled, and torch computes these: making C++ of them takes half
a minute of CPU. COMPRESS_COMPILED=all does that, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.utils import counters

from compress.core.checkpoint import Checkpoint
from compress.core.errors import EnvironmentRefused, UsageError
from compress.core.inductor import require_inductor
from compress.pipeline import RunOptions, run
from distill.features import Features
from distill.logits import Logits
from distill.onpolicy import OnPolicy
from distill.recover import Recover
from distill.sequence import Sequence
from tests.conftest import TinyModel
from tests.contracts.shelf import tokens_for
from tests.distill.test_logits import CUT, Losses, Stopped, lessons, recipe_of

ALL = os.environ.get("COMPRESS_COMPILED") == "all"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled yet, in this process or before."""
    try:
        require_inductor("cpu")
    except EnvironmentRefused as error:
        pytest.skip(error.message)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    if not ALL:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):  # else it tries them all, which takes long
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("method", ["logits", "features"])
def test_it_trains_as_uncompiled_and_goes_on_to_the_bit(tiny_model: TinyModel, tmp_path: Path, method: str) -> None:
    model, settings = tiny_model(), {"method": method, "rows_at_once": 2, "checkpointing": method == "features"}
    plain, whole, first, second = Losses(), Losses(), Losses(3), Losses()
    run(recipe_of(tmp_path, model, CUT, lessons(5, **settings)), RunOptions(tmp_path / "plain"), plain)
    recipe = recipe_of(tmp_path, model, CUT, lessons(5, **settings, compile=True))
    run(recipe, RunOptions(tmp_path / "whole"), whole)
    assert counters["stats"]["unique_graphs"] == 2  # of three blocks of the student, and three of the teacher
    assert whole.values == pytest.approx(plain.values, rel=1e-5)
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "stopped"), first)
    torch._dynamo.reset()
    run(recipe, RunOptions(tmp_path / "stopped"), second)
    assert first.values + second.values == whole.values
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "stopped").iterdir()}
    assert Checkpoint.open(tmp_path / "whole").tensors.keys() == Checkpoint.open(model).tensors.keys()


def test_what_cannot_be_compiled_is_refused_by_name(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    tokens = tokens_for(checkpoint, 16, 32)
    for method in (OnPolicy, Recover, Sequence):
        with pytest.raises(UsageError, match="does not compile blocks") as refused:
            method(compile=True, tokens=1000).plan(checkpoint, tokens)
        assert refused.value.where == "distill.compile"
    with pytest.raises(UsageError, match="blocks with experts are not compiled"):
        Logits(compile=True).plan(Checkpoint.open(tiny_model("qwen3_moe")), tokens)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="a model in parts is not compiled"):
        Logits(compile=True, shard=True).plan(checkpoint, tokens)


def test_a_machine_without_a_compiler_is_told_by_the_plan(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentRefused, match="no-such-compiler is not here"):
        Features(compile=True).plan(checkpoint, tokens_for(checkpoint, 16, 32))
    monkeypatch.setenv("CXX", "python3")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(EnvironmentRefused, match="needs Python.h") as refused:
        require_inductor("cpu")
    assert "python3-dev" in refused.value.hint
    (tmp_path / "Python.h").touch()
    require_inductor("cpu")


@pytest.mark.parametrize("asked", [None, "elsewhere"])
def test_each_process_keeps_code_in_a_folder_of_its_own(tmp_path: Path, asked: str | None) -> None:
    """transformers' import lets torch name a folder below /tmp that all runs share."""
    code = (
        "import os, torch, transformers.modeling_utils, torch._inductor.codecache as made\n"
        "made.cache_dir()\n"
        "from compress.core.inductor import use_own_folder\n"
        "use_own_folder()\n"
        "folder = made.cache_dir()\n"
        "print(folder, oct(os.stat(folder).st_mode)[-3:] if os.path.isabs(folder) else '')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {} if asked is None else {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / asked)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder, *mode = done.stdout.split()
    if asked is None:
        assert Path(folder).name.startswith("compress-") and mode == ["700"]
        assert not Path(folder).exists()
    else:
        assert folder == str(tmp_path / asked)
