"""The bundled runtime as a language model of lm-eval: what is scored is what is deployed.

Texts become tokens exactly as lm-eval's own transformers model does it, so that the two answer the same requests. All
requests of a piece go into the engine at once: continuous batching fills its steps, and requests that share a context
(the answers of a multiple-choice question) compute it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compress.core.errors import UsageError
from compress.core.events import Listener
from compress.evaluate._pieces import in_pieces
from runtime.llm import LLM
from runtime.params import SamplingParams

_PIECE = 512  # requests: enough to keep the engine full
_MAX_GENERATED_TOKENS = 256  # lm-eval's default


class RuntimeLM(TemplateLM):
    """An LLM of the runtime, with a transformers tokenizer for texts and chat templates."""

    def __init__(self, llm: LLM, tokenizer: Any, stage: str, events: Listener) -> None:
        super().__init__()
        self.llm = llm
        self.tokenizer = tokenizer
        self.stage = stage
        self.events = events

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return self.llm.max_length

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return in_pieces(super().loglikelihood, requests, self.stage, self.events, _PIECE)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        return in_pieces(self._rolling, requests, self.stage, self.events, _PIECE)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        return in_pieces(self._generate, requests, self.stage, self.events, _PIECE)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether all are the likeliest) of each continuation after its context."""
        prompts, params, lengths = [], [], []
        for _texts, context, continuation in requests:
            tokens = [*context, *continuation][-self.max_length :]
            count = min(len(continuation), len(tokens) - 1)
            prompts.append(tokens)
            lengths.append(count)
            start = len(tokens) - count
            params.append(SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=start))
        answers = []
        for completion, count in zip(self.llm.generate(prompts, params), lengths, strict=True):
            found = (completion.prompt_logprobs or ())[-count:] if count else ()
            scored = [entry for entry in found if entry is not None]
            answers.append((sum(entry.logprob for entry in scored), all(entry.rank == 1 for entry in scored)))
        return answers

    def _rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap but for their first token."""
        windows, owners = [], []
        for index, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += logprob
        return totals

    def _generate(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        prompts, params, stops = [], [], []
        end = self.tokenizer.decode(self.eot_token_id)
        for context, asked in (request.args for request in requests):
            settings = normalize_gen_kwargs(asked, _MAX_GENERATED_TOKENS)
            until = handle_stop_sequences(settings.pop("until", None), eos=end)
            most = settings.pop("max_gen_toks")
            room = self.max_length - most
            if room < 1:
                raise UsageError(f"max_gen_toks {most} leaves no room for a prompt in {self.max_length} tokens")
            prompts.append(self.tok_encode(context)[-room:])
            params.append(_sampling(settings, most, [stop for stop in until if stop != end]))
            stops.append(until)
        completions = self.llm.generate(prompts, params)
        return [
            postprocess_generated_text(completion.text, until, None)
            for completion, until in zip(completions, stops, strict=True)
        ]


def _sampling(settings: dict[str, Any], max_tokens: int, stop: list[str]) -> SamplingParams:
    """A task's generation settings as SamplingParams; UsageError for one that the runtime does not have."""
    settings = dict(settings)
    samples = settings.pop("do_sample", False)
    temperature = settings.pop("temperature", 1.0) if samples else settings.pop("temperature", 0.0) * 0
    known = {name: settings.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in settings}
    if settings:
        raise UsageError(f"a task asks for the generation setting {next(iter(settings))!r}, which the runtime lacks")
    chosen = known if samples else {name: known[name] for name in ("repetition_penalty",) if name in known}
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=tuple(stop), **chosen)
