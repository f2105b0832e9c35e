"""TRL's DPOTrainer as a loss of a batch: what it makes of pairs is its own, what is done with the gradient is ours.

TRL's loop writes checkpoints that a kill can leave half written, and knows neither masks nor the journal; so the steps,
the saves and the masks are those of every other method, and the trainer is asked for losses and log-probabilities.
It is kept from four things: cutting texts into tokens again (answers are trained on as they were generated), writing
files, telling its makers that it is used, and seeding the generators of the whole process.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from compress.core.documents import hub_offline
from distill._preference_pairs import Pair, PairBatch
from distill._trainer import precision

if TYPE_CHECKING:
    from distill.preference import Preference

PADDING = 0  # whatever token that is: positions behind an answer are masked


class _Trainer(DPOTrainer):
    """Takes pairs as token ids with the reference's log-probabilities."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class Objective:
    """The loss of pairs for a model that is trained, and how likely it says both answers are."""

    def __init__(self, settings: Preference, model: Any, pairs: Sequence[Pair]) -> None:
        self._settings = settings
        self._model = model
        self._examples = [
            {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs
        ]
        self._collate = DataCollatorForPreference(pad_token_id=PADDING)
        with _untouched(), tempfile.TemporaryDirectory() as folder:
            self._trainer = _Trainer(
                model=model,
                args=_config(settings, model.device, folder),
                train_dataset=Dataset.from_list(self._examples[:1]),
                processing_class=_no_tokenizer(),
                data_collator=self._collate,
            )
        self._trainer.remove_callback(PrinterCallback)
        self._measured: list[tuple[int, dict[str, float]]] = []

    @torch.no_grad()
    def log_probabilities(self) -> Tensor:
        """Of each pair's chosen and rejected answer, by the model as it is now, [N, 2]."""
        found = []
        for part in PairBatch(torch.arange(len(self._examples))).split(self._settings.rows_at_once):
            with precision(self._settings, self._model.device), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # a word that transformers 6 will have another for
                both = self._trainer.compute_ref_log_probs(self._model, self._inputs(part))
            found.append(torch.stack(both, 1).float().cpu())
        return torch.cat(found)

    def loss(self, reference_N2: Tensor) -> Callable[[PairBatch], Tensor]:
        """The mean loss over the pairs of a batch, given the reference's log-probabilities of all answers."""

        def of_batch(batch: PairBatch) -> Tensor:
            log_p_2B = reference_N2[batch.pairs_B].unbind(1)
            names = zip(("ref_chosen_logps", "ref_rejected_logps"), log_p_2B, strict=True)
            reference = {name: log_p_B.to(self._model.device) for name, log_p_B in names}
            loss = self._trainer.compute_loss(self._model, self._inputs(batch) | reference)
            self._trainer.log({})  # what it measures is in its history now, and would pile up there
            measured = {name.removeprefix("eval_"): each for name, each in self._trainer.state.log_history[-1].items()}
            self._measured.append((batch.scored, measured))
            self._trainer.state.log_history.clear()
            return loss

        return of_batch

    def figures(self) -> dict[str, float]:
        """Means over the pairs since the last call: in which share the chosen answer's reward is the larger one, and
        by how much. A reward is beta times what an answer gained on the reference, in nats."""
        pairs = sum(count for count, _ in self._measured)
        names = {"reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins"}
        found = {
            ours: sum(count * each[name] for count, each in self._measured) / pairs for ours, name in names.items()
        }
        self._measured.clear()
        return found

    def _inputs(self, batch: PairBatch) -> dict[str, Tensor]:
        made = self._collate([self._examples[number] for number in batch.pairs_B.tolist()])
        return {name: value.to(self._model.device) for name, value in made.items()}


def _config(settings: Preference, device: torch.device, folder: str) -> DPOConfig:
    config = DPOConfig(
        output_dir=folder,
        loss_type=[settings.loss],
        beta=settings.beta,
        precompute_ref_log_probs=True,
        max_length=None,
        router_aux_loss_coef=0.0,
        bf16=False,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,  # blocks have been told already
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to="none",
        disable_tqdm=True,
    )
    if config.n_gpu > 1:
        config._n_gpu = 1  # it is for one device, however many there are
    return config


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants a tokenizer, and these are token ids already."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"-": PADDING}, unk_token="-")), pad_token="-")


@contextmanager
def _untouched() -> Iterator[None]:
    """Every generator of the process goes on as if nothing had been seeded, nothing is sent, and nothing is said."""
    states = random.getstate(), np.random.get_state()
    fork = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with fork, hub_offline(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
