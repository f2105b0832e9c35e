"""lm-eval driven as a library: built tasks, our models, no noise, no request to the hub unless data must be fetched.

Imported only where tasks are measured, since lm-eval takes seconds to import.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers.utils import logging as transformers_logging

from compress.core.documents import hub_offline
from compress.core.errors import InputError
from compress.core.events import Listener
from compress.evaluate._pieces import in_pieces

_BATCH_VOCABULARY = 1 << 19
_MOST_ROWS = 16


class Model(HFLM):
    """A transformers model for lm-eval: fixed batches, progress as events instead of bars."""

    def __init__(self, model: Any, tokenizer: Any, stage: str, events: Listener) -> None:
        vocabulary = model.get_output_embeddings().weight.shape[0]
        rows = max(1, min(_MOST_ROWS, _BATCH_VOCABULARY // vocabulary))
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=rows)
        self.stage = stage
        self.events = events

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
        return in_pieces(super().loglikelihood, requests, self.stage, self.events)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list:
        """Text after one start token. A tokenizer that adds its own would have that one scored as if it were text."""
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return in_pieces(super().loglikelihood_rolling, requests, self.stage, self.events)
        finally:
            self.add_bos_token = before

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list:
        return in_pieces(super().generate_until, requests, self.stage, self.events)

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = True, **options: Any) -> list:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)


def build_tasks(configs: Sequence[dict[str, Any]], names: Sequence[str], *, fewshot: int | None, seed: int) -> dict:
    """Task objects, from configs and from lm-eval's own by name; InputError for names and data that are not there."""
    try:
        loaded = TaskManager(include_defaults=bool(names)).load([*configs, *names])
    except KeyError as error:
        wanted = ", ".join(names)
        raise InputError(f"not all of these are tasks of lm-eval: {wanted} (none is in a task folder)") from error
    except (OSError, ValueError, TypeError, HfHubHTTPError, DatasetsError) as error:
        raise InputError(f"a task cannot be prepared: {' '.join(str(error).split())}") from error
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def answer_tasks(model: Any, loaded: dict, *, limit: int | None, chat_template: bool, seed: int) -> dict[str, Any]:
    """lm-eval's results with each document's own, under `samples`."""
    with seeded(seed):
        results = evaluate(
            model,
            loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    if results is None:
        raise InputError("lm-eval gave no result: this process is not the first of its group")
    return dict(results)


def request_sha256(samples: Sequence[dict[str, Any]]) -> str:
    """One hash of what was asked: documents, prompts and targets in order."""
    digest = hashlib.sha256()
    for sample in samples:
        parts = (sample["doc_id"], sample["filter"], sample["doc_hash"], sample["prompt_hash"], sample["target_hash"])
        digest.update(repr(parts).encode())
    return digest.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Task code that draws from the global random states draws the same for each model; they are put back after."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.setstate(random.Random(seed).getstate())
            np.random.set_state(np.random.RandomState(seed).get_state())
            torch.default_generator.set_state(torch.Generator().manual_seed(seed).get_state())
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def quiet(*, offline: bool) -> Iterator[None]:
    """lm-eval, datasets and transformers say nothing inside, and ask the hub for nothing if `offline`."""
    logger, verbosity = logging.getLogger("lm_eval"), transformers_logging.get_verbosity()
    level, bar, bars_shown = logger.level, lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    with ExitStack() as restore, hub_offline() if offline else nullcontext():
        restore.callback(logger.setLevel, level)
        restore.callback(transformers_logging.set_verbosity, verbosity)
        restore.callback(setattr, lm_eval.api.task, "tqdm", bar)
        if not bars_shown:
            restore.callback(datasets.enable_progress_bars)
        logger.setLevel(logging.CRITICAL)
        transformers_logging.set_verbosity(logging.CRITICAL)
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
        yield
