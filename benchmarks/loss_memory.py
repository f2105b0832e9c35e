"""Memory and time of the loss of distillation, forwards and backwards through the head: in chunks, and written plainly.

    python benchmarks/loss_memory.py [--vocabulary 152000] [--length 4096] [--hidden 64] [--threads 2]
    python benchmarks/loss_memory.py --table      # print the table of what results/loss-memory.json holds

One row of random hidden states of student and teacher goes through a head each; the gradient goes back to the student's
states and head. `in chunks` is what training calls. `plain` is torch alone: logits of the whole row, log_softmax,
kl_div, autograd; other divergences hold more that way. Each case is a process of its own, measured from outside: the
peak of RssAnon, less that of a process that holds the same states and heads and does nothing. `logits`: the peak over
one fp32 [length, vocabulary]. Seconds are those of the loss and its gradient alone.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import tools
from measurement import measure

CASES = {"forward_kl": ("plain", "in chunks"), "reverse_kl": ("in chunks",), "jsd": ("in chunks",)}
NOTHING = "nothing"


def child(way: str, divergence: str, shape: tuple[int, int, int]) -> None:
    """One case; prints its seconds and its loss."""
    import torch

    from distill._logits import tokens_at_once
    from distill._losses import Loss, chunked

    length, vocabulary, width = shape
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(length, width, generator=generator) for _ in range(2))
    head, taught_head = (torch.randn(vocabulary, width, generator=generator) * 0.3 for _ in range(2))
    targets = torch.randint(0, vocabulary, (length,), generator=generator)
    hidden.requires_grad_()
    head.requires_grad_()
    started = time.perf_counter()
    if way == NOTHING:
        time.sleep(0.2)  # long enough to be seen from outside
        loss = torch.zeros(())
    elif way == "plain":
        with torch.no_grad():
            log_p = torch.log_softmax(taught @ taught_head.T, -1)
        log_q = torch.log_softmax(hidden @ head.T, -1)
        loss = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss.backward()
    else:
        student, teacher = (hidden, lambda x: x @ head.T), (taught, lambda x: x @ taught_head.T)
        loss = chunked(Loss(divergence), student, teacher, targets, tokens_at_once(vocabulary))
        loss.backward()
    slope = 0.0 if hidden.grad is None else float(hidden.grad.norm())
    print(json.dumps({"seconds": time.perf_counter() - started, "loss": float(loss.detach()), "slope": slope}))


def case(way: str, divergence: str, asked: argparse.Namespace) -> dict[str, object]:
    command = [sys.executable, __file__, "--way", way, "--divergence", divergence, "--vocabulary"]
    command += [str(asked.vocabulary), "--length", str(asked.length), "--hidden", str(asked.hidden)]
    environment = os.environ | {"OMP_NUM_THREADS": str(asked.threads), "PYTHONPATH": str(tools.REPOSITORY)}
    with tempfile.TemporaryFile() as log:
        seen = measure(command, environment, log)
        log.seek(0)
        said = log.read().decode()
    if seen.exit_code:
        raise SystemExit(f"{way} {divergence}: exit code {seen.exit_code}\n{said}")
    figures = json.loads(said.splitlines()[-1])
    figures |= {"peak_bytes": seen.peak_rss_anon_bytes, "load_before": seen.load_before}
    print(way, divergence, json.dumps(figures), flush=True)
    return {"way": way, "divergence": divergence, **figures}


def run(asked: argparse.Namespace) -> None:
    nothing = case(NOTHING, "forward_kl", asked)
    results = {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": tools.describe_machine() | {"threads": asked.threads},
        "vocabulary": asked.vocabulary,
        "length": asked.length,
        "hidden": asked.hidden,
        "baseline_bytes": nothing["peak_bytes"],
        "cases": [],
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for name, ways in CASES.items():
        for way in ways:
            results["cases"].append(case(way, name, asked))
            asked.out.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict[str, object]) -> str:
    copy = 4 * results["length"] * results["vocabulary"]
    lines = [
        f"Vocabulary {results['vocabulary']:,}, {results['length']:,} tokens, hidden width {results['hidden']}:",
        "",
        "| divergence | | memory | logits | of the first | seconds |",
        "|---|---|--:|--:|--:|--:|",
    ]
    plain = results["cases"][0]["peak_bytes"] - results["baseline_bytes"]
    for found in results["cases"]:
        held = found["peak_bytes"] - results["baseline_bytes"]
        sizes = (f"{held / 1e9:.2f} GB", f"{held / copy:.2f} ×", f"{held / plain:.3f}")
        cells = (found["divergence"], found["way"], *sizes)
        lines.append(f"| {' | '.join(cells)} | {found['seconds']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=(NOTHING, "plain", "in chunks"), help="do this one case, here")
    parser.add_argument("--divergence", choices=tuple(CASES), default="forward_kl")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "loss-memory.json")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if asked.way:
        child(asked.way, asked.divergence, (asked.length, asked.vocabulary, asked.hidden))
        return
    if not asked.table:
        run(asked)
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
