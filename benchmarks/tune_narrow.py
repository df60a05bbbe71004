"""Times the kernels for narrow heads on a GPU: tiles, cuts of sequences, and the sizes of Long Range Arena.

Tiles are compiled first, in processes side by side, and each is timed alone; then cuts of sequences. With the best of
them, whose outputs and gradients must agree with float64, whole calls are timed beside the "chunked" backend and beside
the same width in heads of 128.

    python benchmarks/tune_narrow.py --out narrow.json

The constants of `hgrn2.ops.backends.narrow.tiles` are set from it by hand.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import environment  # noqa: F401  (before torch)
import torch
from report import Row, make_record, row, write_record
from torch import Tensor

from hgrn2.ops import hgrn2_scan
from hgrn2.ops.backends.narrow import launch, tiles
from hgrn2.ops.backends.narrow.tiles import Tile
from hgrn2.ops.call import ScanCall, ScanSettings

# more than bfloat16's rounding of outputs and gradients is wrong
LIMIT = 4e-3
# programs for each multiprocessor below which sequences are cut, and that the parts then make; (0, 1) never cuts
CUTS = ((0, 1), (4, 8), (6, 12), (12, 12), (24, 24), (48, 48))


class Shape(NamedTuple):
    """B, T, H and K = V."""

    batch: int
    length: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}, {self.heads} heads of {self.width}"

    def call(self) -> ScanCall:
        """Random inputs in bfloat16, with a bound."""
        sizes = self[:3]
        q, f, v = (torch.randn(*sizes, self.width, device="cuda").bfloat16() for _ in range(3))
        bound = torch.full((self.heads, self.width), 0.5, device="cuda")
        return ScanCall(q, f, None, v, bound, None, None, ScanSettings(q_activation="silu"))


# of images and of text, and one that is cut into segments
SHAPES = (Shape(64, 1024, 256, 2), Shape(128, 2048, 16, 8), Shape(32, 4096, 16, 8))
TUNED = {shape.width: shape for shape in (*SHAPES[:2], Shape(128, 2048, 32, 4), Shape(64, 4096, 64, 1))}
# more programs than any sequences make
ALWAYS = 1 << 30


def candidates(width: int) -> list[Tile]:
    """Tiles worth a try: larger ones do not fit in registers."""
    found = itertools.product((4, 8, 16), (1, 2, 4, 8))
    fitting = (Tile(*sizes) for sizes in found if 8 <= sizes[0] * sizes[1] <= 32)
    return [tile for tile in fitting if width <= 4 * tile.states <= 4 * max(2, width)]


def milliseconds(call: Callable[[], object], rounds: int = 5) -> list[float]:
    """Times of a call by CUDA events, after a warm-up."""
    call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return times


def passes(call: ScanCall, tile: Tile) -> dict[str, Callable[[], object]]:
    """Forward pass, the one that keeps states, and the backward pass, with a tile."""
    width = tiles.power_of_two(call.q.shape[-1])
    tiles.FORWARD[width] = tiles.BACKWARD[width] = tile
    dy = torch.ones_like(call.v)
    _, _, kept = launch.forward(call, tile.tokens)
    return {
        "forward": lambda: launch.forward(call, 0),
        "forward_kept": lambda: launch.forward(call, tile.tokens),
        "backward": lambda: launch.backward(call, tile.tokens, kept, dy, None, True),
    }


def compile_one(job: tuple[Shape, Tile, bool]) -> None:
    """Leave a tile's kernels in Triton's cache, for whole sequences or cut ones, if they fit the chip."""
    shape, tile, is_cut = job
    tiles.FEWEST_PROGRAMS = ALWAYS if is_cut else 0
    try:
        for run in passes(shape._replace(batch=1, length=128).call(), tile).values():
            run()
        torch.cuda.synchronize()
    # reported where it is measured
    except Exception:
        return


def compile_ahead(widths: list[int], processes: int) -> None:
    """Leave the kernels of all tiles in Triton's cache."""
    jobs = [(TUNED[width], tile, is_cut) for width in widths for tile in candidates(width) for is_cut in (False, True)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))


def sweep_tiles(widths: list[int], deadline: float) -> list[dict[str, object]]:
    """Time every tile, and leave the best in the tables."""
    found: list[dict[str, object]] = []
    fewest, tiles.FEWEST_PROGRAMS = tiles.FEWEST_PROGRAMS, 0
    for shape in (TUNED[width] for width in widths):
        tables = (tiles.FORWARD, tiles.BACKWARD)
        before = [table[shape.width] for table in tables]
        times: dict[Tile, dict[str, float]] = {}
        call = shape.call()
        for tile in candidates(shape.width):
            if time.monotonic() > deadline:
                break
            try:
                times[tile] = {name: min(milliseconds(run, 3)) for name, run in passes(call, tile).items()}
                found.append({"shape": shape, "tile": tile, **times[tile]})
            except Exception as error:
                found.append({"shape": shape, "tile": tile, "error": str(error)[:120]})
        if times:
            best = min(times, key=lambda tile: times[tile]["forward"])
            with_gradients = min(times, key=lambda tile: times[tile]["forward_kept"] + times[tile]["backward"])
            before = [best, with_gradients]
            for name, tile in (("forward", best), ("with gradients", with_gradients)):
                print(f"{shape}: {name} {tile}, ms {times[tile]}")
        for table, tile in zip(tables, before, strict=True):
            table[shape.width] = tile
    tiles.FEWEST_PROGRAMS = fewest
    return found


def sweep_cuts(deadline: float) -> list[dict[str, object]]:
    """Time every cut of the sequences, and print the times."""
    found: list[dict[str, object]] = []
    before = tiles.FEWEST_PROGRAMS, tiles.CUT_PROGRAMS
    for shape in (*SHAPES, Shape(8, 2048, 16, 8), Shape(1, 65536, 16, 8), Shape(256, 196, 192, 2)):
        call = shape.call()
        dy = torch.ones_like(call.v)
        tokens = tiles.BACKWARD[shape.width].tokens
        for cut in CUTS:
            if time.monotonic() > deadline:
                break
            tiles.FEWEST_PROGRAMS, tiles.CUT_PROGRAMS = cut
            _, _, kept = launch.forward(call, tokens)
            forward = min(milliseconds(lambda c=call: launch.forward(c, 0), 3))
            backward = min(
                milliseconds(lambda c=call, n=tokens, k=kept, d=dy: launch.backward(c, n, k, d, None, True), 3)
            )
            found.append({"shape": shape, "cut": cut, "forward": forward, "backward": backward})
            print(f"{shape}: cut {cut}: forward {forward:.3f} ms, backward {backward:.3f} ms")
    tiles.FEWEST_PROGRAMS, tiles.CUT_PROGRAMS = before
    return found


def with_gradients(call: ScanCall, backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Outputs and gradients of q, f and v for a gradient of ones."""
    inputs = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in (call.q, call.f, call.v)]
    assert call.lower_bound is not None
    bound = call.lower_bound if dtype is None else call.lower_bound.to(dtype)
    y, _ = hgrn2_scan(inputs[0], inputs[1], inputs[2], bound, backend=backend)
    return (y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y)))


def worst_error(call: ScanCall) -> float:
    """Largest relative RMS error of outputs and gradients, of two heads of one sequence."""
    assert call.lower_bound is not None
    found = [x[:1, :, :2] for x in with_gradients(call, "narrow")]
    q, f, v = (x[:1, :, :2] for x in (call.q, call.f, call.v))
    part = call._replace(q=q, f=f, v=v, lower_bound=call.lower_bound[:2])
    exact = with_gradients(part, "chunked", torch.float64)
    errors = []
    for x, wanted in zip(found, exact, strict=True):
        errors.append(float((x.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()))
    return max(errors)


def rows_of(shape: Shape) -> list[Row]:
    """Whole calls, forward without gradients and with the backward pass."""
    call = shape.call()
    error = worst_error(call)
    if not error <= LIMIT:
        raise ValueError(f"{shape}: the largest error is {error:.1e}, allowed {LIMIT:.0e}")
    wide = shape._replace(heads=shape.heads * shape.width // 128, width=128)
    runs = [
        ("narrow", call, "narrow", shape),
        ("chunked", call, "chunked", shape),
        ("heads of 128", None, "auto", wide),
    ]
    rows = []
    for name, given, backend, sizes in runs:
        given = sizes.call() if given is None else given
        note = f"error {error:.1e}" if name == "narrow" else None

        def forward(given: ScanCall = given, backend: str = backend) -> object:
            with torch.no_grad():
                return hgrn2_scan(given.q, given.f, given.v, given.lower_bound, backend=backend)

        both = milliseconds(lambda given=given, backend=backend: with_gradients(given, backend))
        rows += [
            row(f"{shape}: {name}, forward", milliseconds(forward), "ms", note),
            row(f"{shape}: {name}, forward + backward", both, "ms"),
        ]
    return rows


def main() -> int:
    """Run the sweeps and the sizes; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--limit-s", type=float, default=30, help="of the sweeps together, once all is compiled")
    parser.add_argument("--widths", type=int, nargs="+", choices=TUNED, default=[2, 8], help="whose tiles are timed")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that compile")
    parser.add_argument("--no-sweep", action="store_true", help="only the sizes of Long Range Arena")
    parser.add_argument("--out", type=Path, help="write every time here, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    swept, rows, right = [], [], True
    if not options.no_sweep:
        began = time.monotonic()
        compile_ahead(options.widths, options.processes)
        print(f"compiled in {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        swept = sweep_tiles(options.widths, began + 0.7 * options.limit_s)
        swept += sweep_cuts(began + options.limit_s)
    for shape in SHAPES:
        try:
            rows += rows_of(shape)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            right = False
    for one in rows:
        print(f"{one.name}: {one.value:.3f} ms {one.note or ''}")
    if options.out:
        tables = {"forward": tiles.FORWARD, "backward": tiles.BACKWARD}
        settings = {"dtype": "bfloat16", "tiles": {name: dict(table) for name, table in tables.items()}}
        write_record(make_record("narrow", settings, rows, "cuda") | {"sweep": swept}, options.out)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
