"""Run several recipes in one process, as the peers' runners do: python benchmarks/run_compress.py RECIPE OUTPUT …

A recipe that fails is named with its error, and the next one follows.
"""

import sys
from pathlib import Path

import compress
from compress.core.errors import CompressError


def main(words: list[str]) -> int:
    failures = 0
    for recipe, output in zip(words[::2], words[1::2], strict=True):
        try:
            compress.run(compress.load_recipe(recipe), compress.RunOptions(output=Path(output), fresh=True))
        except CompressError as error:
            print(f"{recipe}: {error}", flush=True)
            failures += 1
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
