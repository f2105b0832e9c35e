"""StageWriter: where a stage's blocks go. One safetensors shard per block, durable before the journal says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compress.core.cuts import Cut, Cuts, cut, widen
from compress.core.errors import ArtifactError
from compress.core.files import Written, atomic_write, make_folder, write_entries, write_safetensors, written_file
from compress.core.formats import stored_modules, writer_for
from compress.core.journal import Journal
from compress.core.model_files import (
    INDEX_NAME,
    MASKED_KEY,
    SHARD_METADATA,
    shard_index,
    shard_name,
    unquantized,
    write_json,
)
from compress.core.safetensors_io import load_tensor, raw_bytes, read_header, torch_dtype
from compress.core.safetensors_layout import Entry, dtype_name, tensor_bytes, tensor_entry
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor

if TYPE_CHECKING:
    import torch

    from compress.core.checkpoint import Checkpoint
    from compress.core.safetensors_io import TensorInfo
    from compress.core.walk import BlockRecord

ALTERED_AT_ONCE = 1 << 24


class StageWriter:
    """The BlockSink of one stage: writes a checkpoint folder block by block and gives finished blocks back.

    `source` is what the stage reads, `original` what the run started from. A quantizing stage (`rounds`) is the last
    that touches weights: what it keeps is rounded once to the original's dtype; other stages keep what they are given.
    Quantized weights are kept in `format`, those of the source, too; `masked` says that zeros are to stay.
    `after_commit` is called when a block is durable and recorded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        journal: Journal,
        stage: int,
        source: Checkpoint,
        original: Checkpoint,
        rounds: bool,
        format: str = "compressed-tensors",
        masked: bool = False,
        after_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = make_folder(folder)
        self._journal = journal
        self._stage = stage
        self._source = source
        self._original = original
        self._rounds = rounds
        self._format = writer_for(format)
        self._masked = masked
        self._after_commit = after_commit
        self._since = time.monotonic()
        self._blocks = [data for data in journal.of("block") if data["stage"] == stage]
        self._outside: dict[str, Scheme] = {}
        self._attached: dict[str, Written] = {}
        self._added: Mapping[str, torch.Tensor] = {}
        self._describe: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
        for index, data in enumerate(self._blocks):
            self._require_intact(index, data)

    # ------------------------------------------------------------------ BlockSink
    def finished(self) -> int:
        """Leading blocks that are durable."""
        return len(self._blocks)

    def load(self, index: int) -> dict[str, torch.Tensor | QuantTensor]:
        """What `commit` was given for block `index`, as stored: the same names, the same values."""
        data = self._blocks[index]
        infos = read_header(self.folder / data["file"])
        schemes = {module: Scheme(**fields) for module, fields in data["schemes"].items()}
        cuts = {name: [Cut.from_json(one) for one in found] for name, found in data["cuts"].items()}
        found: dict[str, torch.Tensor | QuantTensor] = {}
        for module, scheme in schemes.items():
            found[module] = self._format.decode(module, lambda name: load_tensor(infos[name]), scheme)
        return found | {name: widen(load_tensor(infos[name]), cuts.get(name, ())) for name in data["dense"]}

    def record(self, index: int) -> BlockRecord:
        """What the walk noted about finished block `index`."""
        from compress.core.walk import BlockRecord, SiteRecord

        fields = dict(self._blocks[index]["record"])
        sites = tuple(SiteRecord(**site) for site in fields.pop("sites"))
        return BlockRecord(**fields, sites=sites)

    def commit(
        self,
        index: int,
        tensors: Mapping[str, torch.Tensor | QuantTensor],
        record: BlockRecord,
        cuts: Cuts = MappingProxyType({}),
    ) -> None:
        """Write block `index`: `tensors` where given, the source's own bytes for the rest of the block, each without
        what `cuts` leaves out."""
        if index != len(self._blocks):
            raise ArtifactError(f"block {index} was committed where block {len(self._blocks)} is due")
        quantized = {name: value for name, value in tensors.items() if isinstance(value, QuantTensor)}
        name = shard_name(index, self._source.num_blocks)
        written = write_entries(
            self.folder / name,
            [*self._changed(tensors, cuts), *self._kept(self._source.block_tensors(index), tensors, cuts)],
            SHARD_METADATA,
        )
        data = {
            "stage": self._stage,
            "index": index,
            "file": name,
            **asdict(written),
            "dense": sorted(tensors.keys() - quantized.keys()),
            "schemes": {module: asdict(value.scheme) for module, value in quantized.items()},
            "cuts": {name: [asdict(one) for one in found] for name, found in cuts.items()},
            "record": asdict(record),
            "seconds": self._lap(),
        }
        self._journal.add("block", data)
        self._blocks.append(data)
        self._after_commit()

    def become(self, source: Checkpoint) -> None:
        """From here on `source` is what the stage reads: names, numbers of blocks and config are its own."""
        self._source = source

    def attach(self, name: str, content: str | Mapping[str, torch.Tensor]) -> None:
        """Put a file of text or tensors beside the weights: what readers of the model may take or leave."""
        make_folder((self.folder / name).parent)
        path = self.folder / name
        if isinstance(content, str):
            atomic_write(path, content)
            self._attached[name] = written_file(path)
        else:
            self._attached[name] = write_safetensors(path, content.items(), SHARD_METADATA)

    def add(self, describe: Callable[[dict[str, Any]], dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> None:
        """Have config.json become what `describe` makes of it, and put tensors of new names beside those of blocks."""
        self._describe, self._added = describe, tensors

    # ------------------------------------------------------------------ the rest of the folder
    def finish(self, outside: Mapping[str, QuantTensor] = MappingProxyType({})) -> dict[str, Written]:
        """Write what lies outside the blocks, config, index and auxiliary files; record the stage. Gives all files.

        `outside` replaces weights of modules there; the rest is the source's.
        """
        if len(self._blocks) != self._source.num_blocks:
            raise ArtifactError(f"{len(self._blocks)} of {self._source.num_blocks} blocks are written")
        files = {data["file"]: Written(data["bytes"], data["sha256"]) for data in self._blocks}
        rest = shard_name(self._source.num_blocks, self._source.num_blocks)
        entries = [*self._changed(outside), *self._kept(self._source.rest_tensors(), outside)]
        entries += [tensor_entry(name, tensor) for name, tensor in self._added.items()]
        files[rest] = write_entries(self.folder / rest, entries, SHARD_METADATA)
        self._outside = {module: tensor.scheme for module, tensor in outside.items()}
        for relative in self._source.aux_files:
            make_folder((self.folder / relative).parent)
            atomic_write(self.folder / relative, self._source.aux_bytes(relative))
            files[str(relative)] = written_file(self.folder / relative)
        files["config.json"] = write_json(self.folder / "config.json", self._config())
        weights = [name for name in files if "/" not in name]
        files[INDEX_NAME] = write_json(self.folder / INDEX_NAME, shard_index(self.folder, weights))
        files |= self._attached
        data = {"stage": self._stage, "files": {name: asdict(file) for name, file in files.items()}}
        self._journal.add("stage", {**data, "seconds": self._lap()})
        return files

    def schemes(self) -> dict[str, Scheme]:
        """Module -> scheme of everything that is quantized, by this stage so far or in the source."""
        blocks = (sorted(data["schemes"].items()) for data in self._blocks)
        own = {module: Scheme(**fields) for block in blocks for module, fields in block} | self._outside
        return self._source.schemes | own

    # ------------------------------------------------------------------ entries
    def _changed(
        self, tensors: Mapping[str, torch.Tensor | QuantTensor], cuts: Cuts = MappingProxyType({})
    ) -> Iterator[Entry]:
        for name, value in tensors.items():
            if isinstance(value, QuantTensor):
                encoded = self._format.encode(name, value)
                yield from (tensor_entry(disk_name, tensor) for disk_name, tensor in encoded.items())
            else:
                yield tensor_entry(name, self._rounded(name, cut(value, cuts.get(name, ()))))

    def _kept(
        self, names: list[str], replaced: Mapping[str, object], cuts: Cuts = MappingProxyType({})
    ) -> Iterator[Entry]:
        """Entries for the source's tensors of `names` that nobody replaced, byte for byte where the dtype stays."""
        module_of = stored_modules(self._source)
        coded = dict.fromkeys(module_of[name] for name in names if name in module_of)
        for module in coded:
            tensor = None if module in replaced else self._source.quant_tensor(module)
            if tensor is not None:
                encoded = self._format.encode(module, tensor)
                yield from (tensor_entry(disk_name, part) for disk_name, part in encoded.items())
        for name in names:
            if name in module_of or name in replaced or name.removesuffix(".weight") in replaced:
                continue
            if name in cuts:
                yield tensor_entry(name, self._rounded(name, cut(self._source.tensor(name), cuts[name])))
            elif self._source.alters(name):
                yield self._altered_entry(name)
            else:
                yield self._kept_entry(self._source.tensors[name])

    def _altered_entry(self, name: str) -> Entry:
        """Entry for a tensor that the source transforms as it is read; it is made when its turn comes."""
        wanted = self._wanted_dtype(name) or self._altered_dtype(name)
        shape = tuple(self._source.info(name).shape)
        return Entry(name, wanted, shape, lambda: tensor_bytes(self._altered(name, shape, torch_dtype(wanted))))

    def _altered_dtype(self, name: str) -> str:
        """As the source gives it: what is only cut keeps its dtype."""
        import torch

        return dtype_name(self._source.rows(name, torch.tensor([0])).dtype)

    def _altered(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A transformed tensor in `dtype`; rows of a large one by and by, since fp32 takes twice the room."""
        import torch

        if len(shape) != 2 or math.prod(shape) <= ALTERED_AT_ONCE:
            return self._source.tensor(name).to(dtype)
        found = torch.empty(shape, dtype=dtype)
        step = max(1, ALTERED_AT_ONCE // shape[1])
        for rows in torch.arange(shape[0]).split(step):
            found[rows[0] : rows[-1] + 1] = self._source.rows(name, rows)
        return found

    def _kept_entry(self, info: TensorInfo) -> Entry:
        wanted = self._wanted_dtype(info.name)
        if wanted is None or wanted == info.dtype:
            return Entry(info.name, info.dtype, tuple(info.shape), lambda: raw_bytes(info))
        return tensor_entry(info.name, self._rounded(info.name, load_tensor(info)))

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        wanted = self._wanted_dtype(name)
        return tensor if wanted is None else tensor.to(torch_dtype(wanted))

    def _wanted_dtype(self, name: str) -> str | None:
        """The file dtype that tensor `name` must have here; None: whatever it comes in."""
        if not self._rounds:
            return None
        info = self._original.tensors.get(name)
        return info.dtype if info else dtype_name(self._original.dtype)

    # ------------------------------------------------------------------ JSON
    def _config(self) -> dict[str, Any]:
        config = {key: value for key, value in self._source.config.items() if key != MASKED_KEY}
        if self._masked:
            config[MASKED_KEY] = True
        schemes = self.schemes()
        if schemes:
            kept = unquantized(self._source, schemes)
            config["quantization_config"] = self._format.quantization_config(schemes, kept)
        return self._describe(config)

    # ------------------------------------------------------------------ small things
    def _lap(self) -> float:
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return round(seconds, 3)

    def _require_intact(self, index: int, data: Mapping[str, Any]) -> None:
        path = self.folder / data["file"]
        if data["index"] != index or not path.is_file() or path.stat().st_size != data["bytes"]:
            raise ArtifactError(
                f"finished block {data['index']} is not as the journal says",
                where=str(path),
                hint="--fresh starts over",
            )
