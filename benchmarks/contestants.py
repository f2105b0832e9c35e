"""One contestant of throughput.py in one process: loads, warms up, and does one workload after the other.

    python benchmarks/contestants.py MODEL ours/w4 WORKLOAD…      prints a line of JSON for each workload

Each figure is tokens a second: generated ones (of `prefill`: of the prompt). `served` is how many tokens were counted;
where a contestant is stopped after --box seconds, these are all that came until then.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from workloads import LONGEST, Request, requests_of, tokens_of

PADDED_BATCH = 16  # sequences that transformers pads to one length
Figures = dict[str, float]
Run = Callable[[str, list[Request]], Figures]


def figures(tokens: int, seconds: float) -> Figures:
    return {"tokens_per_second": tokens / seconds, "served": tokens, "seconds": seconds}


# This runtime


@contextmanager
def ours(model: str, box_s: float) -> Iterator[tuple[int, Run]]:
    from runtime.llm import LLM
    from runtime.params import SamplingParams

    llm = LLM(model, max_sequences=64, max_length=2 * LONGEST, prefix_cache=False)

    def run(workload: str, asked: list[Request]) -> Figures:
        for count in {1, min(16, len(asked)), len(asked)}:  # these widths once, so that nothing is set up in between
            llm.generate([[5, 6, 7]] * count, max_tokens=3, ignore_eos=True)
        times = []
        started = time.perf_counter()
        for prompt, tokens in asked:
            llm.add(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        while llm.has_work:
            llm.step()
            times.append(time.perf_counter() - started)
        if workload == "prefill":
            return figures(len(asked[0][0]), times[-1])
        if workload == "stream":
            return figures(tokens_of(asked) - 1, times[-1] - times[0])
        return figures(tokens_of(asked), times[-1])

    yield llm.config.vocab, run


# transformers


@contextmanager
def padded(model: str, box_s: float, dtype: str) -> Iterator[tuple[int, Run]]:
    """`generate` on 16 padded requests at a time, each time until the longest of them is done."""
    import torch
    from transformers import GenerationConfig

    loaded = load_transformers(model, dtype)

    def generate(batch: list[Request]) -> None:
        width, most = max(len(prompt) for prompt, _ in batch), max(tokens for _, tokens in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        settings = GenerationConfig(max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0)
        made = loaded.generate(ids, attention_mask=mask, generation_config=settings)
        if made.shape[1] != width + most:
            raise SystemExit(f"generate made {made.shape[1] - width} tokens, not {most}")

    def seconds_of(batch: list[Request]) -> float:
        started = time.perf_counter()
        generate(batch)
        return time.perf_counter() - started

    def run(workload: str, asked: list[Request]) -> Figures:
        generate([(asked[0][0][:8], 2)])
        if workload == "prefill":
            return figures(len(asked[0][0]), seconds_of(asked))
        if workload == "stream":
            first_s = seconds_of([(asked[0][0], 1)])
            return figures(tokens_of(asked) - 1, seconds_of(asked) - first_s)
        served, seconds = 0, 0.0
        for at in range(0, len(asked), PADDED_BATCH):  # whole batches, since a part of one would be its best part
            if seconds > box_s:
                break
            batch = asked[at : at + PADDED_BATCH]
            seconds += seconds_of(batch)
            served += tokens_of(batch)
        return figures(served, seconds)

    with torch.inference_mode():
        yield loaded.config.vocab_size, run


@contextmanager
def continuous(model: str, box_s: float) -> Iterator[tuple[int, Run]]:
    """Its continuous batching (fp32, attention by torch's own function): what came until --box seconds are over, when
    all requests still have company."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    loaded = load_transformers(model, "float32")
    sizes = ContinuousBatchingConfig(page_size=LONGEST, num_blocks=72, max_batch_tokens=128)
    settings = GenerationConfig(max_new_tokens=LONGEST, do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = loaded.init_continuous_batching(generation_config=settings, continuous_batching_config=sizes)

    def finish(asked: list[Request], box_s: float) -> tuple[int, float]:
        came: dict[str, int] = {}
        started = time.perf_counter()
        names = [manager.add_request(prompt, max_new_tokens=tokens, streaming=True) for prompt, tokens in asked]
        left = set(names)
        while left and time.perf_counter() - started < box_s:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise SystemExit("the thread of transformers' continuous batching has ended")
                continue
            if result.error:
                raise SystemExit(f"transformers' continuous batching: {result.error}")
            came[result.request_id] = len(result.generated_tokens)
            if result.is_finished():
                left.discard(result.request_id)
        return sum(came.values()), time.perf_counter() - started

    def run(workload: str, asked: list[Request]) -> Figures:
        finish([(asked[0][0][:8], 2)], 120.0)
        return figures(*finish(asked, box_s))

    manager.start()
    try:
        yield loaded.config.vocab_size, run
    finally:
        manager.stop(block=True, timeout=60, hard_stop=True)


def load_transformers(model: str, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    loaded.generation_config.eos_token_id = None
    return loaded


# llama.cpp


@contextmanager
def llamacpp(model: str, box_s: float, threads: int) -> Iterator[tuple[int, Run]]:
    """One request at a time: its Python interface has no batches of requests."""
    import numpy as np
    from llama_cpp import Llama

    llama = Llama(model, n_ctx=2 * LONGEST, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(workload: str, asked: list[Request]) -> Figures:
        [(prompt, tokens)] = asked
        for warm_up in (True, False):
            llama.reset()
            started = time.perf_counter()
            llama.eval(prompt[:8] if warm_up else prompt)
            token = greedy()
            read_s = time.perf_counter() - started
            for _ in range(tokens - 1):
                llama.eval([token])
                token = greedy()
            seconds = time.perf_counter() - started
        if workload == "prefill":
            return figures(len(prompt), read_s)
        return figures(tokens - 1, seconds - read_s)

    def greedy() -> int:
        import llama_cpp

        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax())

    yield llama.n_vocab(), run


def contestant(model: str, name: str, box_s: float, threads: int):
    tool, variant = name.split("/")
    if tool == "ours":
        return ours(model, box_s)
    if tool == "llamacpp":
        return llamacpp(model, box_s, threads)
    return continuous(model, box_s) if variant == "continuous" else padded(model, box_s, variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("contestant")
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--box", type=float, default=20.0, help="seconds after which `many` stops for slow contestants")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    with contestant(asked.model, asked.contestant, asked.box, asked.threads) as (vocabulary, run):
        for workload in asked.workloads:
            found = run(workload, requests_of(workload, vocabulary))
            print(json.dumps({"workload": workload, **found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
