"""Killed or failed at any system call, a run that is started again ends with the bytes of an uninterrupted one.

By default 60 seeded points plus every rename and fsync; `make crash` sets COMPRESS_CRASH_POINTS=all and takes them all.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import pytest

from compress.core.manifest import Manifest
from tests.crash.conftest import ForkServer, Reference, contents
from tests.crash.trace import OPENS, RENAMES, SYNCS, Call, order_violations

pytestmark = pytest.mark.crash

ALL = os.environ.get("COMPRESS_CRASH_POINTS") == "all"
BLOCKS = 4  # two stages of two
SAMPLED_KILLS = 60
SAMPLED_ERRORS = 24
ERRORS = {"write": ("ENOSPC", "EIO", "EDQUOT"), "openat": ("ENOSPC",), "mkdir": ("ENOSPC",), "link": ("ENOSPC",)}
OTHER_ERRORS = ("EIO",)

Case = TypeVar("Case")


def on_all(servers: list[ForkServer], work: Callable[[ForkServer, Case], str], cases: list[Case]) -> list[str]:
    """Do `work` for every case, on the servers side by side; what it complains of."""
    free: SimpleQueue[ForkServer] = SimpleQueue()
    for server in servers:
        free.put(server)

    def one(case: Case) -> str:
        server = free.get()
        try:
            return work(server, case)
        finally:
            free.put(server)

    with ThreadPoolExecutor(len(servers)) as pool:
        return [complaint for complaint in pool.map(one, cases) if complaint]


def end_state(tree: Path, reference: Reference) -> str:
    """What is wrong with a finished tree, if anything."""
    names = sorted(path.name for path in tree.iterdir())
    if names != ["out", "out.report"]:
        return f"left {names}"
    if contents(tree / "out") != reference.artifact:
        return "the artifact differs"
    if sorted(contents(tree / "out.report")) != reference.report:
        return f"the report holds {sorted(contents(tree / 'out.report'))}"
    return ""


def resume(server: ForkServer, tree: Path, reference: Reference, before: int) -> str:
    """Start again and compare. A run that had only its empty folder left to remove is refused instead: exit 2."""
    was_over = not (tree / "out.partial" / "journal.jsonl").exists() and (tree / "out" / "compress.json").exists()
    again = server.run(tree)
    if again.code != (2 if was_over else 0):
        return f"ended with {again.code} when started again: {again.message}"
    redone = before + again.commits - BLOCKS
    if redone > 1:
        return f"{redone} blocks were written again"
    return end_state(tree, reference)


def kill_at(server: ForkServer, call: Call, reference: Reference) -> str:
    tree = server.tree(f"kill-{call.point}")
    killed = server.run(tree, inject=f"{call.name}:signal=KILL:when={call.when}")
    if killed.code != -9:
        return f"{call.point} {call.path}: not killed, ended with {killed.code}: {killed.message}"
    problem = resume(server, tree, reference, killed.commits)
    shutil.rmtree(tree)
    return problem and f"{call.point} {call.path}: {problem}"


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    servers: list[ForkServer], reference: Reference
) -> None:
    calls = reference.calls[servers[0].name]
    certain = [place for place, call in enumerate(calls) if call.name in (*RENAMES, *SYNCS)]
    others = sorted(set(range(len(calls))) - set(certain))
    points = certain + (others if ALL else random.Random(0).sample(others, SAMPLED_KILLS))
    assert len(points) > 130

    def work(server: ForkServer, place: int) -> str:
        return kill_at(server, reference.calls[server.name][place], reference)

    assert on_all(servers, work, points) == []


OLD_MANIFEST = Manifest(version="0", files=(), recipe={}, fingerprint={}, lineage={}, coverage=())
OLD = {"config.json": "an older artifact", "compress.json": OLD_MANIFEST.text()}


def put_old_artifact(tree: Path) -> None:
    (tree / "out").mkdir()
    for name, text in OLD.items():
        (tree / "out" / name).write_text(text)


def fail_at(server: ForkServer, call: Call, traced: Path, error: str, reference: Reference) -> str:
    """Let `call`, seen in the tree `traced`, fail. An open is found by its path: how many files are read may vary."""
    tree = server.tree(f"{error}-{call.point}")
    put_old_artifact(tree)
    if call.name in OPENS:
        path = tree / call.path.relative_to(traced)
        failed = server.run(tree, inject=f"{call.name}:error={error}:when={call.nth}", only_path=str(path), fresh=True)
    else:
        failed = server.run(tree, inject=f"{call.name}:error={error}:when={call.when}", fresh=True)
    where = f"{call.point} {error} {call.path}"
    if failed.code != 4 or "cannot" not in failed.message:
        return f"{where}: ended with {failed.code}: {failed.message}"
    now = {name: path.read_text(errors="replace") for name in OLD if (path := tree / "out" / name).is_file()}
    if now != OLD and contents(tree / "out") != reference.artifact:
        return f"{where}: the older artifact was touched"
    problem = resume(server, tree, reference, failed.commits) if now != OLD or has_journal(tree) else ""
    shutil.rmtree(tree)
    return problem and f"{where}: {problem}"


def has_journal(tree: Path) -> bool:
    return (tree / "out.partial" / "journal.jsonl").exists()


def test_write_errors_end_with_4_spare_the_older_artifact_and_can_be_resumed(
    servers: list[ForkServer], reference: Reference
) -> None:
    calls = {}
    for server in servers:
        tree = server.tree("replacing")
        put_old_artifact(tree)
        replacing = server.run(tree, trace=True, fresh=True)
        assert replacing.code == 0, replacing.message
        assert end_state(tree, reference) == ""
        assert order_violations(replacing.calls) == []
        calls[server.name] = replacing.calls
    every = [
        (place, error)
        for place, call in enumerate(calls[servers[0].name])
        for error in ERRORS.get(call.name, OTHER_ERRORS)
        if call.name != "mkdir" or call.nth == 1  # a folder that is there already need not be made
    ]
    chosen = every if ALL else random.Random(1).sample(every, SAMPLED_ERRORS)

    def work(server: ForkServer, case: tuple[int, str]) -> str:
        return fail_at(server, calls[server.name][case[0]], server.tree("replacing"), case[1], reference)

    assert on_all(servers, work, chosen) == []


def test_every_rename_is_preceded_by_fsync_and_followed_by_fsync_of_the_folder(reference: Reference) -> None:
    for calls in reference.calls.values():
        assert sum(call.name in RENAMES for call in calls) > 15
        assert order_violations(calls) == []


def test_another_folder_locale_time_zone_and_hash_seed_give_equal_bytes(
    servers: list[ForkServer], reference: Reference
) -> None:
    tree = servers[1].tree("elsewhere")
    outcome = servers[1].run(tree, cwd="/tmp")
    assert outcome.code == 0, outcome.message
    assert end_state(tree, reference) == ""


def test_the_trace_reader_sees_missing_fsyncs() -> None:
    def call(name: str, path: str, source: str | None = None) -> Call:
        return Call(name, 1, Path(path), Path(source) if source else None)

    good = [call("write", "/a/.t"), call("fsync", "/a/.t"), call("rename", "/a/t", "/a/.t"), call("fsync", "/a")]
    assert order_violations(good) == []
    assert len(order_violations(good[:1] + good[2:])) == 1
    assert len(order_violations(good[:3])) == 1
    assert len(order_violations([*good[:3], call("write", "/a/j"), good[3]])) == 1
    assert len(order_violations([good[1], good[0], *good[2:]])) == 1
