"""The training loop: token stream, schedule, checkpoints, and the best weights by held-out bits per byte."""

import copy
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from compress.core.files import write_safetensors
from compress.demo.training.muon import Muon
from compress.demo.training.score import bits_per_byte

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What fixes a training run besides its text."""

    steps: int = 1500
    batch_tokens: int = 4096
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    held_out_share: float = 0.05
    warmup_steps: int = 40
    decay_share: float = 0.6
    # Short rows make attention cheaper; the last part of the run sees rows of the whole context.
    short_row_tokens: int = 256
    long_row_tokens: int = 512
    long_rows_share: float = 0.4
    evaluate_every_steps: int = 100
    seed: int = 0


class TokenStream:
    """An endless stream of stories, shuffled anew in every epoch, that can be read from any position."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stories: list[str], seed: int):
        encoded = tokenizer(stories, verbose=False)["input_ids"]
        self._stories = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in encoded]
        self._seed = seed
        self.epoch_tokens = sum(map(len, self._stories))

    def read(self, start: int, count: int) -> torch.Tensor:
        """The tokens from position `start` on."""
        first, last = start // self.epoch_tokens, (start + count - 1) // self.epoch_tokens
        tokens = torch.cat([self._epoch(epoch) for epoch in range(first, last + 1)])
        offset = start - first * self.epoch_tokens
        return tokens[offset : offset + count]

    def _epoch(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._stories), generator=generator).tolist()
        return torch.cat([self._stories[i] for i in order])


class Trainer:
    """Trains `model` in place and keeps a copy of its best weights."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        stream: TokenStream,
        held_out: list[str],
        settings: Settings,
        workers: int,
    ):
        self.model, self.tokenizer, self.stream, self.held_out = model, tokenizer, stream, held_out
        self.settings = settings
        # Rows of one batch on threads of their own wait for each other once a step, not once in every operation.
        self.workers, self.pool = workers, ThreadPoolExecutor(workers)
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        self.optimizers = [
            Muon(matrices, lr=settings.muon_lr, momentum=0.95, weight_decay=settings.weight_decay),
            torch.optim.AdamW(
                [
                    {"params": [model.model.embed_tokens.weight], "weight_decay": settings.weight_decay},
                    {"params": vectors, "weight_decay": 0.0},
                ],
                lr=settings.adam_lr,
                betas=(0.9, 0.95),
            ),
        ]
        self.step = 0
        self.best_bits, self.best_step = float("inf"), 0
        self.best_weights: dict[str, torch.Tensor] = {}

    def train(self, checkpoint: Path) -> None:
        """Run to the last step, with a checkpoint at every evaluation."""
        settings = self.settings
        started = time.monotonic()
        for inputs_BT, targets_BT in self._batches():
            loss = self._train_step(inputs_BT, targets_BT)
            self.step += 1
            if self.step % 10 == 0:
                seconds = time.monotonic() - started
                log.info("step %d/%d loss %.4f %.0f s", self.step, settings.steps, loss, seconds)
            if self.step % settings.evaluate_every_steps == 0 or self.step == settings.steps:
                self._evaluate()
                self._save(checkpoint)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint of the same text and settings; only `steps` may differ."""
        with safe_open(checkpoint, framework="pt") as file:
            facts = file.metadata()
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        self.model.load_state_dict(_part(kept, "model/"), strict=False)
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in _part(kept, f"optimizer{index}/").items():
                parameter, _, key = name.partition("/")
                state.setdefault(int(parameter), {})[key] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        self.best_weights = _part(kept, "best/")
        self.step, self.best_step = int(facts["step"]), int(facts["best_step"])
        self.best_bits = float(facts["best_bits"])
        log.info("resumed at step %d", self.step)

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        settings = self.settings
        for step in range(self.step, settings.steps):
            tokens = self.stream.read(step * settings.batch_tokens, settings.batch_tokens + 1)
            is_long = step >= settings.steps * (1 - settings.long_rows_share)
            row_tokens = settings.long_row_tokens if is_long else settings.short_row_tokens
            yield tokens[:-1].view(-1, row_tokens), tokens[1:].view(-1, row_tokens)

    def _train_step(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> float:
        self.model.train()
        parts = zip(inputs_BT.chunk(self.workers), targets_BT.chunk(self.workers), strict=True)
        losses = self.pool.map(lambda part: self._accumulate(*part, targets_BT.numel()), parts)
        loss = sum(losses)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, lr in zip(self.optimizers, (self.settings.muon_lr, self.settings.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * self._schedule()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    def _accumulate(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, batch_tokens: int) -> float:
        """Add the gradients of some rows; their share of the batch's mean loss."""
        logits_BTV = self.model(input_ids=inputs_BT, use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
        loss = nats / batch_tokens
        loss.backward()
        return loss.item()

    def _schedule(self) -> float:
        """Warm up, hold, then fall linearly to zero; a held rate lets the length of a run be changed on resume."""
        settings = self.settings
        left = (settings.steps - self.step) / (settings.steps * settings.decay_share)
        return min(1.0, (self.step + 1) / settings.warmup_steps, left)

    def _evaluate(self) -> None:
        bits = bits_per_byte(self.model, self.tokenizer, self.held_out)
        log.info("step %d held-out bits per byte %.4f", self.step, bits)
        if bits < self.best_bits:
            self.best_bits, self.best_step = bits, self.step
            self.best_weights = copy.deepcopy(self.model.state_dict())

    def _save(self, checkpoint: Path) -> None:
        parts = {"model/": self._unique(self.model.state_dict()), "best/": self._unique(self.best_weights)}
        for index, optimizer in enumerate(self.optimizers):
            states = optimizer.state_dict()["state"].items()
            parts[f"optimizer{index}/"] = {f"{i}/{key}": value for i, state in states for key, value in state.items()}
        facts = {"step": self.step, "best_step": self.best_step, "best_bits": self.best_bits}
        entries = [(prefix + name, value) for prefix, part in parts.items() for name, value in part.items()]
        write_safetensors(checkpoint, entries, {key: repr(value) for key, value in facts.items()})

    def _unique(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Without the head, which is the embedding."""
        return {name: value for name, value in weights.items() if name != "lm_head.weight"}


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
