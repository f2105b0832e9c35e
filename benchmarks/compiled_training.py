"""What `compile` wins in training on a CPU, and what it costs first.

    python benchmarks/compiled_training.py --data DIR [--steps 4]
    python benchmarks/compiled_training.py --table      # print the table of what results/compiled-training.json holds

stories-7m learns from itself with noise in its weights (5 % of a tensor's standard deviation): steps of 8 rows of 250
tokens, 4 at once, with the update of AdamW, one thread. Two students, one of them compiled (its teacher, too), take
the steps in turn in one process, so that the load of the machine meets both. Seconds are those of the CPU, the median
of the steps behind the first. Compiling is what the first step took more than others, with the compilers that it
started, from an empty cache; blocks are the same in `features`, which finds them compiled.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import tools
from make_tokens import encode, stories

CASES = tuple((method, precision) for method in ("logits", "features") for precision in ("fp32", "bf16"))
ROWS, LENGTH, NOISE = 8, 250, 0.05


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Way:
    """A student with its teacher, and what its steps took."""

    def __init__(self, folder: Path, method: str, precision: str, compiled: bool) -> None:
        import torch

        from compress.core.checkpoint import Checkpoint
        from compress.core.passes import Job
        from distill._blocks import prepare_blocks
        from distill._features import Inside, features_loss, projection
        from distill._logits import online_loss
        from distill._student import Student
        from distill.features import Features
        from distill.logits import Logits

        settings = {"batch": ROWS, "precision": precision, "compile": compiled, "save_every": 1_000_000}
        self.settings = (Features if method == "features" else Logits)(**settings)
        checkpoint = Checkpoint.open(folder)
        job = Job(checkpoint, None, None)
        teacher = checkpoint.build_model(torch.float32).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for value in teacher.parameters():
            value.add_(NOISE * value.std() * torch.randn(value.shape, generator=generator))
        prepare_blocks(self.settings, teacher, checkpoint.architecture)
        if method == "logits":
            self.student = Student(job, self.settings)
            self._loss = online_loss(self.settings.loss, self.student.model, teacher)
        else:
            width = checkpoint.config["hidden_size"]
            pairs = {layer: layer for layer in range(checkpoint.num_blocks)}
            made = {layer: projection(width, width, 0, "cpu") for layer in pairs}
            self.student = Student(job, self.settings, {f"projection.{layer}": each for layer, each in made.items()})
            inside = Inside.of(self.student.model), Inside.of(teacher)
            self._loss = features_loss(self.settings, *inside, pairs, made)
        self.seconds: list[float] = []
        self.compilers: list[float] = []

    def step(self, batch: object, number: int, total: int) -> None:
        from distill._trainer import precision

        before, children = time.process_time(), children_seconds()
        value = 0.0
        for part in batch.split(self.settings.rows_at_once):
            with precision(self.settings, self.student.model.device):
                loss = self.student.loss(self._loss, part) * (part.scored / batch.scored)
            loss.backward()
            value += float(loss.detach())
        self.student.update(number, total + 1, value)
        self.seconds.append(time.process_time() - before)
        self.compilers.append(children_seconds() - children)


def case(folder: Path, batches: list[object], method: str, precision: str) -> dict[str, object]:
    from torch._dynamo.utils import counters

    ways = {compiled: Way(folder, method, precision, compiled) for compiled in (False, True)}
    counters.clear()
    load = os.getloadavg()[0]
    for number, batch in enumerate(batches):
        for way in ways.values():
            way.step(batch, number, len(batches))
    plain, compiled = ways[False], ways[True]
    each = [statistics.median(way.seconds[1:]) for way in (plain, compiled)]
    losses = zip(plain.student.losses, compiled.student.losses, strict=True)
    return {
        "method": method,
        "precision": precision,
        "plain_seconds": each[0],
        "compiled_seconds": each[1],
        "all_seconds": {"plain": plain.seconds, "compiled": compiled.seconds},
        "compiling_seconds": compiled.seconds[0] - each[1] + sum(compiled.compilers),
        "compilers_seconds": sum(compiled.compilers),
        "graphs": counters["stats"]["unique_graphs"],
        "losses_apart": max(abs(one - other) / one for one, other in losses),
        "losses": plain.student.losses,
        "load_before": load,
    }


def batches_of(folder: Path, text: Path, steps: int) -> list[object]:
    import torch

    from distill._batches import NO_TARGET, Batch

    wanted = steps * ROWS * LENGTH
    ids = [token for encoded in encode(folder, stories(text)[:400]) for token in encoded][:wanted]
    found = []
    for ids_BT in torch.tensor(ids).view(steps, ROWS, LENGTH):
        target_BT = torch.full_like(ids_BT, NO_TARGET)
        target_BT[:, :-1] = ids_BT[:, 1:]
        found.append(Batch(ids_BT, target_BT))
    return found


def run(asked: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    folder = asked.data / "models" / "stories-7m"
    batches = batches_of(folder, asked.data / "text" / "tinystories-b.txt", asked.steps)
    results = {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": tools.describe_machine() | {"threads": 1},
        "steps": asked.steps,
        "cases": [],
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as empty:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": empty, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for method, precision in CASES:
            results["cases"].append(case(folder, batches, method, precision))
            print(json.dumps(results["cases"][-1]), flush=True)
            asked.out.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict[str, object]) -> str:
    lines = [
        "| stories-7m, one thread | | steps a second of the CPU | compiled | | seconds to compile |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for found in results["cases"]:
        plain, compiled = found["plain_seconds"], found["compiled_seconds"]
        cells = [f"{1 / plain:.2f}", f"{1 / compiled:.2f}", f"{plain / compiled:.2f} ×"]
        cells.append(f"{found['compiling_seconds']:.0f}" if found["compilers_seconds"] else "")
        lines.append(f"| {found['method']} | {found['precision']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with models/ and text/")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "compiled-training.json")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.data is None:
            parser.error("--data is needed (benchmarks/README.md says what it holds)")
        run(asked)
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
