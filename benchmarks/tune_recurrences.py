"""Times block sizes of the kernels of element-wise and selective recurrences on a GPU, and prints the best.

    python benchmarks/tune_recurrences.py --out sweep.json

The constants of `hgrn2.ops.triton.linear_launch` and `selective_launch` are set from it by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import environment  # noqa: F401  (before torch)
import torch

from hgrn2.ops.triton import linear_launch, selective_launch
from hgrn2.ops.triton.selective_launch import Inputs, Tile

# batch, tokens, channels; the last one is cut into segments
LINEAR_SHAPES = [(8, 2048, 2048), (64, 512, 512), (1, 32768, 2048)]
# tokens, channels, warps, stages
LINEAR_BLOCKS = [
    (8, 32, 1, 1), (16, 32, 1, 1), (32, 32, 1, 1), (64, 32, 1, 1), (16, 32, 1, 2), (16, 32, 1, 3), (32, 32, 1, 2),
    (32, 16, 1, 1), (16, 128, 1, 1),
]  # fmt: skip
SELECTIVE_SHAPES = [(8, 2048, 4096, 16), (64, 512, 1024, 16)]
FORWARD_TILES = [(2, 8, 1), (1, 8, 1), (4, 8, 1), (1, 16, 1), (2, 16, 1)]
BACKWARD_TILES = [(1, 8, 1), (2, 8, 1), (1, 16, 1), (1, 4, 1), (2, 4, 1), (2, 8, 2)]
TOKENS = (8, 16, 4)


def microseconds(call: Callable[[], object], rounds: int = 5) -> float:
    """The shortest of several runs."""
    call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return min(times)


def sweep_linear(results: list[dict], deadline: float) -> None:
    """Every block for real numbers, and for complex ones with a rotation."""
    for shape, is_complex in itertools.product(LINEAR_SHAPES, (False, True)):
        pair = (2,) if is_complex else ()
        a, b, dh = torch.rand(shape, device="cuda"), *(torch.randn(*shape, *pair, device="cuda") for _ in range(2))
        turn = torch.randn(shape[-1], 2, device="cuda") / 2 if is_complex else None
        for block in LINEAR_BLOCKS:
            if time.monotonic() > deadline:
                return
            for name in ("BLOCK_TOKENS", "BACKWARD_TOKENS", "COMPLEX_TOKENS"):
                setattr(linear_launch, name, block[0])
            linear_launch.BLOCK_CHANNELS, linear_launch.WARPS, linear_launch.STAGES = block[1:]
            row = {"kernel": "linear", "shape": shape, "complex": is_complex, "block": block}
            try:
                h, _ = linear_launch.forward(a, b, turn, None, None, False)
                row["forward_us"] = microseconds(
                    lambda a=a, b=b, t=turn: linear_launch.forward(a, b, t, None, None, False)
                )
                row["backward_us"] = microseconds(
                    lambda a=a, h=h, t=turn, dh=dh: linear_launch.backward(
                        a, h, t, None, None, False, dh, None, torch.float32
                    )
                )
            except Exception as error:
                row["error"] = str(error)[:120]
            results.append(row)


def sweep_selective(results: list[dict], deadline: float) -> None:
    """Every tile, forward and backward apart."""
    for batch, length, width, states in SELECTIVE_SHAPES:
        u, dy = (torch.randn(batch, length, width, device="cuda") for _ in range(2))
        dt, a = torch.rand(batch, length, width, device="cuda") * 0.1, -torch.rand(width, states, device="cuda") * 8
        b, c = torch.randn(2, batch, length, states, device="cuda").unbind(0)
        call = Inputs(u.bfloat16(), dt, a, b.bfloat16(), c.bfloat16(), None, False)
        for tokens in TOKENS:
            kept = torch.zeros(batch * -(-length // tokens), states, width, device="cuda")
            for kind, tiles in (("forward", FORWARD_TILES), ("backward", BACKWARD_TILES)):
                for tile in tiles:
                    if time.monotonic() > deadline:
                        return
                    setattr(selective_launch, kind.upper(), Tile(*tile))
                    row = {
                        "kernel": "selective",
                        "shape": (batch, length, width, states),
                        "tokens": tokens,
                        "tile": tile,
                    }
                    try:
                        if kind == "forward":
                            run = lambda: selective_launch.forward(call, None, kept, tokens)  # noqa: B023, E731
                        else:
                            run = lambda: selective_launch.backward(call, kept, dy, None, tokens)  # noqa: B023, E731
                        row[f"{kind}_us"] = microseconds(run, 3)
                    except Exception as error:
                        row["error"] = str(error)[:120]
                    results.append(row)


def show(results: list[dict]) -> None:
    """Print the three best blocks of each kernel and shape."""
    for kernel, kind in itertools.product(("linear", "selective"), ("forward_us", "backward_us")):
        rows = [row for row in results if row["kernel"] == kernel and kind in row]
        for shape, is_complex in sorted({(row["shape"], row.get("complex", False)) for row in rows}):
            same = [row for row in rows if row["shape"] == shape and row.get("complex", False) == is_complex]
            best = sorted(same, key=lambda row: row[kind])[:4]
            shown = ", ".join(
                f"{row.get('tokens', '')} {row.get('block') or row.get('tile')}: {row[kind]:.0f}" for row in best
            )
            print(f"{kernel} {'complex ' if is_complex else ''}{shape} {kind}: {shown}")
    failed = [row for row in results if "error" in row]
    for row in failed[:5]:
        print("failed:", row)
    print(f"{len(results)} timed, {len(failed)} failed")


def main() -> int:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--limit-s", type=float, default=100, help="of both sweeps together")
    parser.add_argument("--out", type=Path, help="write every time here")
    options = parser.parse_args()
    results: list[dict] = []
    began = time.monotonic()
    for sweep, share in ((sweep_selective, 0.6), (sweep_linear, 1.0)):
        try:
            sweep(results, began + share * options.limit_s)
        except Exception as error:
            print(f"{sweep.__name__} ended: {error}", file=sys.stderr)
        if options.out:
            options.out.write_text(json.dumps(results))
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
