"""What verify finds out about a folder before it looks at a single weight: names, links, pickles, index, headers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.core.errors import ArtifactError, InputError
from compress.core.manifest import MANIFEST_NAME, Manifest
from compress.core.safetensors_io import TensorInfo, read_header

_NAMED = 3  # of several files with the same fault
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
_PICKLE_START = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|7z\xbc\xaf")
_SHARD = re.compile(r"model-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_JSON_LIMIT_BYTES = 256 << 20


@dataclass
class Contents:
    """A model folder as read so far. `tensors` by disk name, `shards` in name order."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    shards: list[Path] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)


def files_of(folder: Path) -> list[Path]:
    """All files and links below the folder; links are not followed."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def check_names(folder: Path) -> str:
    """No links out of the folder, no pickles under any name, no two names that differ in case only."""
    files = files_of(folder)
    seen: dict[str, str] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not _is_hub_link(folder, path):
            raise ArtifactError("is a symbolic link", where=name, hint="replace it by the file itself")
        if not path.is_file():
            raise ArtifactError("is neither a file nor a folder", where=name)
        if path.suffix.lower() in _PICKLES:
            raise ArtifactError("may be a pickle, which runs code when it is opened", where=name, hint="remove it")
        with path.open("rb") as file:
            if _PICKLE_START.match(start := file.read(9)) and not _header_follows(path, start):
                raise ArtifactError("is a pickle or an archive under another name", where=name, hint="remove it")
        twin = seen.setdefault(name.casefold(), name)
        if twin != name:
            raise ArtifactError(f"differs from {twin} in upper and lower case only", where=name)
    return f"{len(files)} files"


def _header_follows(path: Path, start: bytes) -> bool:
    """Whether a safetensors file begins with the length of its header, which may look like a pickle's first bytes."""
    return path.suffix == ".safetensors" and start[4:] == b"\0\0\0\0{"


def _is_hub_link(folder: Path, path: Path) -> bool:
    """Links of the hub's own cache: snapshots/COMMIT/file -> blobs/HASH."""
    root = folder.resolve().parent
    return root.name == "snapshots" and path.resolve().parent == root.parent / "blobs"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object with unique keys. InputError names the file."""
    try:
        if path.stat().st_size > _JSON_LIMIT_BYTES:
            raise InputError(f"is larger than {_JSON_LIMIT_BYTES >> 20} MB", where=path.name)
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise InputError("is missing", where=path.name) from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", where=path.name) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not valid JSON: {error}", where=path.name) from None
    if not isinstance(data, dict):
        raise InputError("is not a JSON object", where=path.name)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's compress.json, None if it has none."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", where=path.name) from None
    manifest = Manifest.parse(text, where=path.name)
    if manifest.text() != text:
        raise ArtifactError("was changed after it was written: its digest does not fit", where=path.name)
    return manifest


def check_listing(contents: Contents, manifest: Manifest) -> str:
    """Every file that the manifest lists is there with its size, and there is no other."""
    found = {path.relative_to(contents.folder).as_posix(): path for path in files_of(contents.folder)}
    listed: set[str] = set()
    missing: list[str] = []
    for record in manifest.files:
        if record.path in listed:
            raise ArtifactError(f"lists {record.path} twice", where=MANIFEST_NAME)
        listed.add(record.path)
        if record.path not in found:
            missing.append(record.path)
            continue
        size = found[record.path].stat().st_size
        if size != record.size:
            raise ArtifactError(f"has {size} bytes, the manifest says {record.size}", where=record.path)
    if missing:
        raise ArtifactError(f"{'is' if len(missing) == 1 else 'are'} missing", where=_named(missing))
    extra = sorted(found.keys() - listed - {MANIFEST_NAME})
    if extra:
        raise ArtifactError(f"{'is' if len(extra) == 1 else 'are'} not listed in the manifest", where=_named(extra))
    return f"{len(listed)} files with their sizes"


def _named(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def read_weights(contents: Contents) -> str:
    """Fill `shards` and `tensors`: headers are sane, no tensor lies in two shards, no numbered shard is missing."""
    folder = contents.folder
    contents.shards = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not contents.shards:
        raise InputError("the folder holds no safetensors weights", where=str(folder))
    for shard in contents.shards:
        for name, info in _header(shard).items():
            if name in contents.tensors:
                other = contents.tensors[name].file.name
                raise ArtifactError(f"tensor {name!r} is also in {other}", where=shard.name)
            contents.tensors[name] = info
    _check_numbers(contents.shards)
    return f"{len(contents.tensors)} tensors in {len(contents.shards)} files"


def _header(shard: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(shard)
    except InputError as error:
        raise InputError(error.message, where=shard.name, hint=error.hint) from None


def _check_numbers(shards: list[Path]) -> None:
    """model-00002-of-00003 wants its siblings, and no second set of shards beside it."""
    matches = [match for shard in shards if (match := _SHARD.fullmatch(shard.name))]
    totals = {int(match["total"]) for match in matches}
    if len(totals) > 1 or (matches and any(shard.name == SINGLE_NAME for shard in shards)):
        raise ArtifactError("belongs to another set of shards than its neighbours", where=matches[-1].string)
    numbers = {int(match["number"]) for match in matches}
    missing = sorted(set(range(1, min(totals, default=0) + 1)) - numbers)
    if missing:
        name = f"model-{missing[0]:05}-of-{min(totals):05}.safetensors"
        raise InputError("is missing", where=name)


def check_index(contents: Contents) -> str:
    """model.safetensors.index.json says of every tensor, and of no other, in which shard it lies."""
    path = contents.folder / INDEX_NAME
    if not path.exists():
        if len(contents.shards) > 1:
            raise InputError(f"is missing, though there are {len(contents.shards)} shards", where=INDEX_NAME)
        return "one file, no index"
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError("weight_map is not an object", where=INDEX_NAME)
    for name, file in weight_map.items():
        info = contents.tensors.get(name)
        if not isinstance(file, str) or info is None or info.file.name != file:
            raise ArtifactError(f"weight_map puts {name!r} in {file!r}, where it is not", where=INDEX_NAME)
    unmapped = next((name for name in contents.tensors if name not in weight_map), None)
    if unmapped is not None:
        raise ArtifactError(
            f"weight_map lacks {unmapped!r} of {contents.tensors[unmapped].file.name}", where=INDEX_NAME
        )
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(info.bytes for info in contents.tensors.values())
    if total is not None and total != size and contents.manifest is not None:
        raise ArtifactError(f"metadata.total_size is {total!r}, the tensors have {size} bytes", where=INDEX_NAME)
    return f"{len(weight_map)} tensors mapped"


def layer_numbers(tensors: Iterator[str] | dict[str, TensorInfo], blocks: str) -> set[int]:
    """The numbers of the decoder layers that have tensors."""
    depth = blocks.count(".") + 1
    parts = (name.split(".") for name in tensors if name.startswith(blocks + "."))
    return {
        int(part[depth]) for part in parts if len(part) > depth and part[depth].isdecimal() and len(part[depth]) < 10
    }
