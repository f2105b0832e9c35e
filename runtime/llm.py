"""LLM: a model folder, loaded and ready to complete prompts.

    llm = LLM("out")
    for completion in llm.generate(["The sun", "Once upon a time"], max_tokens=32):
        print(completion.text, completion.finish_reason)

Prompts are texts or lists of token ids; chat templates are the caller's business.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast

import torch

from compress.core._model_folder import TOKENIZER_FILES, read_json
from compress.core.checkpoint import Checkpoint
from compress.core.errors import EnvironmentRefused, InputError, UsageError
from kv_compress._budget import Points
from kv_compress._coded_pages import CodingPoints
from kv_compress.eviction import EvictionSettings, eviction_of
from kv_compress.policy import KVPolicy
from runtime.compaction import Compactor
from runtime.completion import Completion, Drafts
from runtime.engine import Engine, EngineSettings, EngineStats
from runtime.graphs import DecodeGraphs
from runtime.head_compaction import HeadCompactor
from runtime.kv_policy import blaming, with_eviction
from runtime.loader import load
from runtime.memory import allocate
from runtime.models.config import ModelConfig
from runtime.models.decoder import Decoder
from runtime.params import SamplingParams, SamplingSettings
from runtime.runner import Runner
from runtime.sample import Update
from runtime.scheduler import QueueFull, SchedulerSettings
from runtime.settings import require_whole
from runtime.small_steps import SmallSteps
from runtime.trace import Recorder, require_place

__all__ = ["LLM", "Completion", "Prompt", "SchedulerKeywords"]

Prompt = str | Sequence[int]


class SchedulerKeywords(TypedDict, total=False):
    """The fields of SchedulerSettings as keywords of a call."""

    token_budget: int
    max_sequences: int
    max_queue: int
    policy: str
    chunked_prefill: bool
    prefix_cache: bool
    headroom_tokens: int
    tenant_weights: dict[str, float]
    input_weight: float
    output_weight: float


class LLM:
    """A model, of a folder or an open checkpoint, on one device with its pool of keys and values.

    numerics: "fast", or "exact" (fp32; a request's tokens depend on nothing but itself). memory: bytes, or a size such
    as "4GiB", for weights, keys and values, and activations together; kv_bytes: for keys and values alone. By default
    the pool takes what `max_sequences` of `max_length` need, at most a quarter of the memory that is free (GPU: 90 %).
    max_length: longest sequence, prompt and completion together (default: the model's). record: a file that takes down
    every step for replay (see runtime.trace); close() completes it. seed: for requests that bring none. sparse: "auto"
    packs layers of a pruned model whose zeros make them faster here, "off" leaves them dense. kv_cache: how keys and
    values are kept: "full", "int8", "int4", "fp8" or a KVPolicy; by default as the artifact says. eviction: which of
    them are dropped (see kv_compress.eviction); their pages go back to the pool; by default as the policy says.
    The other keywords are those of SchedulerSettings.

    Raises InputError for a folder that cannot be loaded, ResourceError where memory does not suffice.
    """

    def __init__(
        self,
        path: str | Path | Checkpoint,
        *,
        numerics: Literal["exact", "fast"] = "fast",
        device: str = "auto",
        dtype: torch.dtype | None = None,
        memory: int | str | None = None,
        kv_bytes: int | str | None = None,
        block_size: int = 16,
        max_length: int | None = None,
        cuda_graphs: bool = True,
        sparse: Literal["auto", "off"] = "auto",
        kv_cache: KVPolicy | str | None = None,
        record: str | Path | None = None,
        eviction: EvictionSettings | None = None,
        seed: int | None = None,
        **scheduler: Unpack[SchedulerKeywords],
    ) -> None:
        settings = _scheduler_settings(scheduler)
        require_whole("block_size", block_size, least=1)
        if seed is not None:
            require_whole("seed", seed, least=0)
        folder = path.folder if isinstance(path, Checkpoint) else path
        _require_places(path=folder, record=record)
        if record is not None:
            require_place(Path(record))
        if eviction is not None and not isinstance(eviction, EvictionSettings):
            raise UsageError(f"eviction is a policy (kv_compress.eviction.EvictionSettings), not {eviction!r}")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise UsageError(f"dtype is one of torch's, such as torch.float32, not {dtype!r}")
        folder = Path(folder)
        device = _device(device)
        source = path if isinstance(path, Checkpoint) else folder
        model = load(source, numerics=numerics, device=device, dtype=dtype, sparse=sparse, kv_cache=kv_cache)
        own = eviction is None and kv_cache is None
        eviction = eviction or eviction_of(model.kv_policy)
        if eviction is not None:
            model.kv_policy = with_eviction(model.kv_policy, len(model.config.layers), eviction)
        self.config = model.config
        self.max_length = _longest(max_length, model.config.max_length)
        self.tokenizer = _tokenizer(folder)
        by_head = eviction is not None and eviction.is_unequal
        sizes = _bytes("memory", memory), _bytes("kv_bytes", kv_bytes)
        paged = model.kv_policy is not None and model.kv_policy.is_paged
        field, whose = ("layers", kv_cache is None) if paged else ("eviction.method", own and by_head)
        with blaming(folder, field, own=whose):
            cache, pool, ledger = allocate(model, block_size, self.max_length, settings, *sizes, by_head=by_head)
        whole: DecodeGraphs | SmallSteps | None = SmallSteps.of(model, cache)
        if cuda_graphs and model.capturable and cache.frames is None and cache.pages > pool.pages:
            whole = DecodeGraphs.of(model, cache, pool.pages_for(self.max_length), settings.max_sequences)
        self.ledger = replace(ledger, graphs_bytes=0 if whole is None else whole.bytes)
        kind = HeadCompactor if by_head else Compactor
        with blaming(folder, "eviction.recent", own=own):
            compactor = None if eviction is None else kind.of(model, cache, eviction)
        runner = Runner(model, cache, device, whole=whole, compactor=compactor)
        with blaming(folder, "eviction.budget", own=own):
            token_bytes = pool.page.bytes // block_size
            points = cache.points if eviction is None else _points(eviction, model.config, token_bytes)
        self._recorder = None if record is None else Recorder(Path(record))
        self.engine = Engine(
            runner,
            pool,
            self.tokenizer,
            EngineSettings(self.max_length, _end_tokens(folder), seed, settings),
            recorder=self._recorder,
            points=points,
        )
        self._kept: list[Update] = []  # news of requests that nobody asked about yet
        self._turn = threading.RLock()  # threads take turns at the engine: their requests share its steps

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Complete the recording, if there is one."""
        if self._recorder is not None:
            self._recorder.close()

    def refresh(self, checkpoint: Checkpoint) -> None:
        """Take the weights of another checkpoint of the same shapes, in place of ours and where they lie; what was
        computed with the old ones is forgotten. UsageError while a request is being worked on."""
        with self._turn:
            if self.has_work:
                raise UsageError("weights cannot change while requests are being worked on")
            model: Decoder = self.engine.runner.model
            fresh = load(checkpoint, numerics=model.numerics, device=model.device, dtype=model.dtype)
            for own, new in zip(model.buffers(), fresh.buffers(), strict=True):
                own.copy_(new)
            self.engine.scheduler.pool.forget()

    # All at once

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        special_tokens: bool = True,
        **settings: Unpack[SamplingSettings],
    ) -> list[Completion]:
        """Complete every prompt (greedily, unless told otherwise): n completions for each, in the order of the prompts.

        Settings are keywords (see SamplingParams), or `params`: one for all prompts or one for each. `special_tokens`:
        texts get what the tokenizer adds by default. However many prompts there are, the queue takes them as it can.
        Raises UsageError for bad settings and prompts, RequestTooLong for a prompt that can never fit.
        """
        encoded = [self.encode(prompt, special_tokens=special_tokens) for prompt in _listed(prompts)]
        drafts = Drafts()
        with ExitStack() as interrupted:
            interrupted.callback(self._drop, drafts)
            for prompt, its_params in zip(encoded, _params(params, settings, len(encoded)), strict=True):
                drafts.expect(self._add_when_possible(prompt, its_params, drafts), its_params.n)
            while drafts.open:
                drafts.take(self._news_of(drafts))
            interrupted.pop_all()
        return drafts.completions()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        special_tokens: bool = True,
        **settings: Unpack[SamplingSettings],
    ) -> Iterator[Update]:
        """Complete one prompt, telling what is new step by step. To stop early, close the iterator: that aborts.

        Bad settings are refused at once; the prompt is taken in when the first update is asked for.
        """
        [its_params] = _params(params, settings, 1)
        return self._stream(self.encode(prompt, special_tokens=special_tokens), its_params)

    def _stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Update]:
        drafts = Drafts()
        with self._turn:
            drafts.expect(self.engine.add(prompt, params), params.n)
        try:
            while drafts.open:
                news = self._news_of(drafts)
                drafts.take(news)
                yield from news
        finally:
            self._drop(drafts)

    def encode(self, prompt: Prompt, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt; a list of ids is taken as it is."""
        if isinstance(prompt, bytes) or not isinstance(prompt, str | Sequence):
            raise UsageError(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}")
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise UsageError("the model's folder has no tokenizer", hint="give prompts as lists of token ids")
        return self.tokenizer(prompt, add_special_tokens=special_tokens, verbose=False)["input_ids"]

    # Step by step

    @property
    def has_work(self) -> bool:
        """Whether a further step has anything to do or to tell."""
        return bool(self._kept) or self.engine.has_work

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request: str | None = None,
        *,
        tenant: str = "",
        priority: int = 0,
        special_tokens: bool = True,
    ) -> str:
        """Take a request in and return its name; `step` tells about it. See Engine.add for what is refused."""
        ids = self.encode(prompt, special_tokens=special_tokens)
        with self._turn:
            return self.engine.add(ids, params, request, tenant=tenant, priority=priority)

    def step(self) -> list[Update]:
        """Compute one step; what is new about the requests."""
        with self._turn:
            kept, self._kept = self._kept, []
            return kept + self.engine.step()

    def abort(self, request: str) -> None:
        """End a request; the next step reports it with finish_reason "abort"."""
        with self._turn:
            self.engine.abort(request)

    @property
    def kv_tokens(self) -> int:
        """How many tokens the pages of the pool hold, which `ledger.kv_pool_bytes` were allocated for; how many of one
        sequence, where whole pages are coded."""
        pool = self.engine.scheduler.pool
        return pool.points.longest(pool.pages) if isinstance(pool.points, CodingPoints) else pool.slots

    def stats(self) -> EngineStats:
        """Counts of steps, tokens, pages and requests."""
        return self.engine.stats()

    def _add_when_possible(self, prompt: list[int], params: SamplingParams, drafts: Drafts) -> str:
        while True:
            try:
                with self._turn:
                    return self.engine.add(prompt, params)
            except QueueFull:
                drafts.take(self._news_of(drafts))

    def _news_of(self, drafts: Drafts) -> list[Update]:
        """News of some requests, after one more step if there are none yet; those of others are kept."""
        with self._turn:
            if not any(update.request in drafts for update in self._kept):
                self._kept += self.engine.step()
            mine = [update for update in self._kept if update.request in drafts]
            self._kept = [update for update in self._kept if update.request not in drafts]
            return mine

    def _drop(self, drafts: Drafts) -> None:
        """Nobody will ask about these any more."""
        with self._turn:
            for request in drafts.unfinished():
                self.engine.forget(request)
            self._kept = [update for update in self._kept if update.request not in drafts]


def _points(eviction: EvictionSettings, config: ModelConfig, token_bytes: int) -> Points:
    return eviction.points(token_bytes, len(config.layers), config.layers[0].kv_heads)


def _require_places(**places: object) -> None:
    for name, place in places.items():
        if place is not None and not isinstance(place, str | Path):
            raise UsageError(f"{name} is a path, not {place!r}")


def _device(name: str) -> str:
    """The device to run on. UsageError for one that does not exist, EnvironmentRefused for one that is not here."""
    if not isinstance(name, str):
        raise UsageError(f"device is a text such as cpu or cuda, not {name!r}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is none of auto, cpu, cuda, cuda:0 …")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EnvironmentRefused("there is no GPU that torch can use here", hint="device='cpu' runs everywhere")
    return name


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A text or one list of ids is one prompt."""
    if not isinstance(prompts, str | Sequence):
        raise UsageError(f"prompts are texts or lists of token ids, not {type(prompts).__name__}")
    if isinstance(prompts, str | bytes) or (len(prompts) and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)


def _params(
    params: SamplingParams | Sequence[SamplingParams] | None, settings: SamplingSettings, prompts: int
) -> list[SamplingParams]:
    if params is not None and settings:
        raise UsageError(f"give either params or keywords such as {next(iter(settings))}, not both")
    if params is None:
        params = SamplingParams.of({"temperature": 0.0} | settings)
    listed = [params] * prompts if isinstance(params, SamplingParams) else list(params)
    if len(listed) != prompts:
        raise UsageError(f"{len(listed)} params for {prompts} prompts; give one, or one for each prompt")
    return listed


def _scheduler_settings(keywords: SchedulerKeywords) -> SchedulerSettings:
    known = [field.name for field in fields(SchedulerSettings)]
    for name in keywords:
        if name not in known:
            raise UsageError(f"LLM has no setting {name}", hint=f"those of the scheduler: {', '.join(known)}")
    return SchedulerSettings(**keywords)


def _longest(asked: int | None, possible: int) -> int:
    if asked is None:
        return possible
    require_whole("max_length", asked, least=1)
    if asked > possible:
        raise UsageError(f"max_length must be from 1 to {possible}, the model's own limit, not {asked}")
    return asked


def _bytes(name: str, size: int | str | None) -> int | None:
    if size is None:
        return None
    from compress.core.quantities import parse_size

    try:
        count = parse_size(size)
    except ValueError as error:
        raise UsageError(f"{name} {error}") from error
    if count < 1:
        raise UsageError(f"{name} must be above 0, not {size!r}")
    return count


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none: token ids go in and out all the same."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from compress.core.checkpoint import load_tokenizer

    return load_tokenizer(folder)


def _end_tokens(folder: Path) -> tuple[int, ...]:
    """What ends a text: of generation_config.json, or else of config.json; one id, several, or none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if any(type(id) is not int or id < 0 for id in ids):
            raise InputError(f"eos_token_id is {found!r}, not a token id or a list of them", where=str(path))
        if ids:
            return tuple(ids)
    return ()
