"""Trains a small language model, and times the scan of each layer on what the layer reads then.

Gates of a trained model are not those of random inputs: the first layers, whose lower bounds are near 0, learn to close
some. The kernels go other ways through chunks with closed gates (docs/kernels.md), so here is what that costs, and how
many chunks it concerns.

    python benchmarks/layers.py tokens.npy --seconds 100 --out benchmarks/results/layers.json

tokens.npy has token ids (uint16 or wider) of at least a few million tokens of text, by any tokenizer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import environment  # noqa: F401  (before torch)
import numpy as np
import torch
from report import Row, arguments, compare, report, row
from torch import Tensor

from hgrn2.models import HGRN2LM, presets
from hgrn2.nn.mixers.hgrn2 import HGRN2, forget_gate
from hgrn2.ops import hgrn2_scan
from hgrn2.ops.backends.reference import floored

SIZE = {"hidden_size": 1024, "num_hidden_layers": 12, "expand_ratio": 128, "intermediate_size": 2816}
BATCH, LENGTH, CHUNK = 16, 2048, 64
LEARNING_RATE, WARMUP_STEPS = 1e-3, 50
HELD_OUT = 1 << 18
# calls in a row, behind a queue long enough that the host does not count
CALLS, QUEUE_CYCLES = 10, 20_000_000


class Read(NamedTuple):
    """Inputs of the scan of a layer."""

    q: Tensor
    f: Tensor
    v: Tensor
    bound: Tensor | None
    settings: dict[str, Any]


def batch_of(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [BATCH, LENGTH] from random places, and those that follow."""
    places = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=generator)
    rows = torch.stack([ids[i : i + LENGTH + 1] for i in places.tolist()]).long()
    return rows[:, :-1], rows[:, 1:].contiguous()


def train(model: HGRN2LM, ids: Tensor, seconds: float) -> int:
    """Trains for some time and returns the number of tokens."""
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not model.model.lower_bounds]
    others = [p for p in model.parameters() if p.dim() != 2 or p is model.model.lower_bounds]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    generator, start, steps = torch.Generator().manual_seed(1), time.monotonic(), 0
    while (done := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (steps + 1) / WARMUP_STEPS) * (1 - 0.9 * done)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(*batch_of(ids, generator), keep_state=False).mean
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps % 50 == 0:
            print(f"step {steps}, {100 * done:.0f}%, loss {float(loss.detach()):.3f}", file=sys.stderr)
    return steps * BATCH * LENGTH


@torch.no_grad()
def read_by_layers(model: HGRN2LM, ids: Tensor) -> tuple[list[Read], float]:
    """Return the inputs of the layers' scans on held-out text, and the loss there in nats per token."""
    found: list[Read] = []

    def watch(mixer: HGRN2, inputs: tuple[Any, ...]) -> None:
        x, state, context = inputs
        q, f, v = mixer.project(x, state, context).inputs
        bound = context.lower_bound
        bound = None if bound is None else bound.unflatten(-1, (mixer.num_heads, mixer.expand_ratio)).contiguous()
        names = ("scale", "q_activation", "v_activation", "min_log_decay")
        found.append(Read(q, f, v, bound, {name: getattr(mixer, name) for name in names}))

    handles = [m.register_forward_pre_hook(watch) for m in model.modules() if isinstance(m, HGRN2)]
    with torch.autocast("cuda", torch.bfloat16):
        loss = model.loss(*batch_of(ids, torch.Generator().manual_seed(2)), keep_state=False).mean
    for handle in handles:
        handle.remove()
    return found, float(loss)


def ways(read: Read) -> str:
    """Shares of the chunks of a head with gates that dense products cannot take, by the limits of the kernels."""
    gate = floored(forget_gate(read.f, read.bound), read.settings.get("min_log_decay"))
    kept = gate.log2().clamp_min(-1000).unflatten(1, (LENGTH // CHUNK, CHUNK))
    blocks = kept.unflatten(2, (4, 16)).sum(3)
    whole = (blocks.unflatten(2, (2, 2)).sum(3).amin((2, -1)) < -80).float().mean()
    halves = (blocks.amin((2, -1)) < -80).float().mean()
    closed = (kept.amin((2, -1)) < -13).float().mean()
    return (
        f"median gate {float(gate.flatten()[::97].median()):.2f}; of the chunks {100 * float(whole):.0f} % have half a "
        f"chunk below 2^-80, {100 * float(halves):.0f} % 16 tokens, {100 * float(closed):.0f} % a gate below 2^-13"
    )


def milliseconds(call: Callable[[], object], rounds: int) -> list[float]:
    """Return the time of consecutive calls, with their launches queued beforehand."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        for _ in range(CALLS):
            call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / CALLS)
    return times


def scan_of(read: Read) -> Tensor:
    """The outputs."""
    return hgrn2_scan(read.q, read.f, read.v, read.bound, **read.settings)[0]


def gradients_of(read: Read, dy: Tensor) -> None:
    """Forward and backward pass, with the gradients that training wants."""
    wanted = [x for x in (read.q, read.f, read.v, read.bound) if x is not None and x.requires_grad]
    torch.autograd.grad(scan_of(read), wanted, dy)


def rows_of(name: str, read: Read, learns: bool, rounds: int) -> list[Row]:
    """Times of one layer, whose bound has a gradient if it `learns`."""
    q, f, v = (x.detach().clone().requires_grad_() for x in read[:3])
    bound = None if read.bound is None else read.bound.detach().clone().requires_grad_(learns)
    note = ways(read)
    read, dy = Read(q, f, v, bound, read.settings), torch.randn_like(v)
    calls = {"forward": torch.no_grad()(partial(scan_of, read)), "forward + backward": partial(gradients_of, read, dy)}
    return [row(f"{name}: {kind}", milliseconds(call, rounds), "ms", note) for kind, call in calls.items()]


def main() -> int:
    """Trains, then measures every layer."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("tokens", type=Path, help="a .npy file of token ids")
    parser.add_argument("--seconds", type=float, default=100.0, help="how long to train")
    parser.add_argument("--variant", default="fla", choices=sorted(presets.VARIANTS), help="of the architecture")
    parser.set_defaults(device="cuda")
    options = parser.parse_args()
    if torch.device(options.device).type != "cuda" or not torch.cuda.is_available():
        parser.error("kernels are measured on a GPU, and there is none here")
    try:
        ids = torch.from_numpy(np.load(options.tokens).astype(np.int32))
    except (OSError, ValueError) as reason:
        parser.error(f"{options.tokens} could not be read ({reason}); wanted a .npy file of token ids")
    if len(ids) < 4 * HELD_OUT:
        parser.error(f"{options.tokens} has {len(ids):,} tokens; wanted {4 * HELD_OUT:,} or more")
    ids, held_out = ids[:-HELD_OUT].to(options.device), ids[-HELD_OUT:].to(options.device)
    torch.manual_seed(0)
    keys = {"vocab_size": -(-int(ids.max() + 1) // 64) * 64, "tie_word_embeddings": True}
    model = HGRN2LM(presets.variant(options.variant, **SIZE | keys)).to(options.device)
    num_tokens = train(model, ids, options.seconds)
    reads, loss = read_by_layers(model, held_out)
    rows = [Row("training: tokens", num_tokens, "tokens"), Row("held-out loss", loss, "nats a token")]
    random = Read(*(torch.randn_like(x) for x in reads[0][:3]), torch.full_like(reads[-1].bound, 0.5), {})  # pyright: ignore
    rows += rows_of("random gates, bound 0.5", random, True, options.rounds)
    for i, read in enumerate(reads):
        rows += rows_of(f"layer {i}", read, i > 0, options.rounds)
        for kind in ("forward", "forward + backward"):
            compare(rows, f"layer {i}: {kind}", f"random gates, bound 0.5: {kind}")
    settings = {"variant": options.variant, "B": BATCH, "T": LENGTH, "seconds": options.seconds} | SIZE
    report("layers", settings, rows, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
