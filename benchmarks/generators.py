"""Time the generators of synthetic tasks: `python benchmarks/generators.py [SECONDS]`; prints a Markdown table."""

from __future__ import annotations

import sys
import time

from hgrn2.tasks import GENERATORS, SyntheticOptions, generate
from hgrn2.tasks.generators import ListOpsOptions, MQAROptions
from hgrn2.tasks.generators.base import block_size

# Zoology's sizes, and Long Range Arena's
FURTHER = [MQAROptions(length=length, num_pairs=pairs) for length, pairs in ((128, 8), (256, 16), (512, 64))]
FURTHER += [ListOpsOptions(length=2000, min_length=501)]


def rate(options: SyntheticOptions, seconds: float) -> float:
    """Return examples per second of the fastest call within some seconds."""
    count, best, end = 4 * block_size(options), 0.0, time.perf_counter() + seconds
    generate(options, count)
    while (start := time.perf_counter()) < end:
        generate(options, count)
        best = max(best, count / (time.perf_counter() - start))
    return best


def main(seconds: float) -> None:
    """Print one row per generator."""
    print("| task | tokens | examples per second |\n| --- | ---: | ---: |")
    for options in [*(kind() for kind in GENERATORS.values()), *FURTHER]:
        print(f"| {options.name} | {options.length:,} | {rate(options, seconds):,.0f} |")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
