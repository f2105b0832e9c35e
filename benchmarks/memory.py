"""Peak memory, minutes and bytes of one GPTQ run on a model folder, against what the plan said before it.

    python benchmarks/memory.py --model DIR --work DIR [--samples 32 --length 512] --name memory-1b

GPTQ W4 g64, evaluation off, random token ids. RssAnon of the command and its children is taken every 20 ms.
"""

import argparse
import json
import shutil
from pathlib import Path

import tools
from make_tokens import random_ids
from measurement import measure
from runner import Job
from safetensors.numpy import save_file

import compress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", required=True, help="of the JSON under results")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    tokens, output = asked.work / f"{asked.name}.safetensors", asked.work / asked.name
    vocabulary = json.loads((asked.model / "config.json").read_text())["vocab_size"]
    save_file({"input_ids": random_ids(vocabulary, 0, asked.samples, asked.length)}, tokens)
    for leftover in (output, Path(f"{output}.report"), Path(f"{output}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    job = Job(str(asked.model), str(tokens), str(output), "", 4, 64)
    recipe_file = tools.write_recipe(job, asked.samples, asked.length, asked.work / f"{asked.name}.yaml")
    recipe = compress.load_recipe(recipe_file, model=str(asked.model))
    plan = compress.plan(recipe, compress.RunOptions(output=output, evaluate=False))
    with (asked.work / f"{asked.name}.log").open("wb") as log:
        measured = measure(tools.our_command(job, recipe_file), tools.quiet_environment(asked.threads), log)
    run = json.loads((Path(f"{output}.report") / "run.json").read_text()) if measured.exit_code == 0 else {}
    result = {
        "environment": tools.describe_machine() | {"threads": asked.threads},
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "model": asked.model.name,
        "tokens": [asked.samples, asked.length],
        "planned": {
            "peak_memory_bytes": plan.peak_memory_bytes,
            "bytes_out": plan.bytes_out,
            "disk_bytes": plan.disk_bytes,
            "minutes": plan.minutes,
        },
        "measured": {
            "exit_code": measured.exit_code,
            "peak_rss_anon_bytes": measured.peak_rss_anon_bytes,
            "bytes_out": run.get("artifact", {}).get("bytes"),
            "minutes": measured.seconds / 60,
            "cpu_seconds": measured.cpu_seconds,
            "load_before": measured.load_before,
        },
    }
    out = tools.HERE / "results" / f"{asked.name}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
