"""Times the directions of HGRN2's mixer on a GPU, forward + backward, against the causal mixer.

    python benchmarks/directions.py --out benchmarks/results/directions.json

Every mixer has the same weights and reads the same bfloat16 inputs under autocast; gradients are those of the input,
the lower bound and every parameter. "by flipped copies" is the bidirectional mixer without a reverse scan: the
projected inputs are flipped, scanned forward, and the outputs flipped back. "alternating" is half of the time of a
causal and a reverse mixer, one after the other; its memory is that of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import environment  # noqa: F401  (before torch)
import torch
from layers import milliseconds
from report import Row, arguments, compare, report, row
from torch import Tensor

from hgrn2.nn.mixers import Context, find_mixer
from hgrn2.nn.mixers.hgrn2 import HGRN2, HGRN2Options
from hgrn2.nn.parameters import InitialValues

# batch, rows and columns of the grid, width, width of a head
SHAPES = [
    (64, 32, 32, 512, 128), (64, 32, 32, 1024, 128), (64, 32, 32, 2048, 128), (64, 32, 32, 512, 8),
    (256, 14, 14, 384, 128), (256, 14, 14, 512, 128), (256, 14, 14, 1024, 128), (256, 14, 14, 2048, 128),
    (32, 64, 64, 512, 128),
]  # fmt: skip
KINDS = ("causal", "reverse", "bidirectional", "columns", "2d", "2d-series")
FLIPPED, ALTERNATING = "bidirectional by flipped copies", "alternating"
# bfloat16 rounds each of two outputs and their sum
LIMIT = 2e-2


def make(width: int, head: int, direction: str, device: str) -> HGRN2:
    """A mixer with weights that depend on the sizes alone."""
    mixer = find_mixer("hgrn2").build(width, HGRN2Options(expand_ratio=head), direction=direction)
    mixer.reset_parameters(InitialValues(0.02, 0, 12, torch.Generator().manual_seed(0)))
    assert isinstance(mixer, HGRN2)
    return mixer.to(device)


def mix_flipped(mixer: HGRN2, x: Tensor, context: Context) -> Tensor:
    """The bidirectional mixer with copies of its inputs in reverse order."""
    inputs, others, _ = mixer.project(x, None, context)
    y = mixer.mix(inputs, None, context)[0]
    flipped = mixer.mix(tuple(part.flip(1) for part in inputs), None, context)[0].flip(1)
    return mixer.finish(y + flipped, others)


def run(calls: list[Callable[[Tensor], Tensor]], x: Tensor, wanted: list[Tensor], dy: Tensor) -> None:
    """Forward and backward pass of mixers one after the other."""
    with torch.autocast(x.device.type, torch.bfloat16):
        y = x
        for call in calls:
            y = call(y)
    torch.autograd.grad(y, wanted, dy)


def mixer_call(mixer: HGRN2, context: Context) -> Callable[[Tensor], Tensor]:
    """The mixer as a function of x."""
    return lambda x: mixer(x, None, context)[0]


def rows_of(shape: tuple[int, int, int, int, int], rounds: int, device: str) -> list[Row]:
    """Times of one shape, checked beforehand."""
    batch, rows, columns, width, head = shape
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, rows * columns, width, device=device, dtype=torch.bfloat16, generator=generator)
    dy = torch.randn(x.shape, device=device, dtype=torch.bfloat16, generator=generator)
    x.requires_grad_()
    bound = torch.full((width,), 0.5, device=device, requires_grad=True)
    context = Context(keep_state=False, lower_bound=bound, grid=(rows, columns))
    mixers = {kind: make(width, head, kind, device) for kind in KINDS}
    calls = {kind: [mixer_call(mixer, context)] for kind, mixer in mixers.items()}
    calls[FLIPPED] = [partial(mix_flipped, mixers["causal"], context=context)]
    calls[ALTERNATING] = [*calls["causal"], *calls["reverse"]]
    label = f"B{batch} {rows}x{columns} D{width} K{head}"
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
        found, exact = (calls[kind][0](x).float() for kind in ("bidirectional", FLIPPED))
    error = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    if not error < LIMIT:
        sys.exit(f"{label}: the bidirectional mixer differs from flipped copies by {error:.2g}; nothing is timed")
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    peaks: dict[str, int] = {}
    for i in range(rounds):
        for kind in list(calls)[:: 1 if i % 2 == 0 else -1]:
            owners = (
                [mixers["causal"], mixers["reverse"]] if kind == ALTERNATING else [mixers.get(kind, mixers["causal"])]
            )
            wanted = [x, bound, *(p for mixer in owners for p in mixer.parameters())]
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            times[kind] += milliseconds(partial(run, calls[kind], x, wanted, dy), 1)
            peaks[kind] = torch.cuda.max_memory_allocated(device) - before
    times[ALTERNATING] = [t / 2 for t in times[ALTERNATING]]
    found_rows = [row(f"{label}: {kind}", values, "ms") for kind, values in times.items()]
    for kind in calls:
        if kind != "causal":
            compare(found_rows, f"{label}: {kind}", f"{label}: causal")
    for entry, peak in zip(found_rows, peaks.values(), strict=True):
        cost = "" if entry.ratio is None else f"costs {1 / entry.ratio:.2f} x the causal mixer, "
        entry.note = f"{cost}{peak / 2**20:,.0f} MiB beyond weights and inputs"
    return found_rows


def main() -> int:
    """Measures every shape."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cuda", rounds=3)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="indices of the shapes")
    options = parser.parse_args()
    if torch.device(options.device).type != "cuda" or not torch.cuda.is_available():
        parser.error("kernels are measured on a GPU, and there is none here")
    rows = [entry for i in options.shapes for entry in rows_of(SHAPES[i], options.rounds, options.device)]
    report("directions", {"dtype": "bfloat16", "pass": "forward + backward"}, rows, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
