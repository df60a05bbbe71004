"""Compiles every Triton kernel of the package for a Hopper GPU, on a machine without one.

The launchers run as they are, on tensors of the CPU, beside a driver that names a GPU: kernels are compiled for the
arguments that they would get, and nothing is launched. Triton's interpreter does not check what the compiler checks:
that a variable keeps its shape and dtype in a loop or a branch.

Run as a program, whose argument is a folder for compiled kernels, it prints JSON: `kernels`, the names of all kernels,
and `results`, each with `kernel`, `case`, `seconds`, `shared` (bytes of a program) and `problem` (null for none).
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # read when Triton is imported
    os.environ["TRITON_INTERPRET"] = "0"

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import hgrn2
from hgrn2.ops.call import ScanCall, ScanSettings

LOW, FLOAT32 = torch.bfloat16, torch.float32
Case = Callable[[], object]


class NoGPU:
    """A driver of a Hopper GPU that is not there."""

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return compute capability 9.0."""
        return GPUTarget("cuda", 90, 32)


def written_kernels() -> list[str]:
    """Return the names of all kernels of the package, `file.kernel`."""
    root, found = Path(hgrn2.__file__).parent, set[str]()
    for path in root.rglob("*.py"):
        if "@triton.jit" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(".".join(("hgrn2", *path.relative_to(root).with_suffix("").parts)))
            functions = [value for value in vars(module).values() if isinstance(value, JITFunction)]
            # functions that kernels call have other names
            found |= {_name(f) for f in functions if f.__module__ == module.__name__ and f.__name__.endswith("_kernel")}
    return sorted(found)


def _name(kernel: JITFunction[Any]) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def decode_cases() -> Iterator[tuple[str, Case]]:
    """Yield products of few rows at widths of the 1.3B model, and of one piece."""
    from hgrn2.ops.triton import decode

    for dtype, rows, inner, columns in (
        (LOW, 1, 2048, 6144), (LOW, 4, 2048, 11264), (LOW, 1, 5632, 2048), (FLOAT32, 3, 6144, 2048),
        (FLOAT32, 2, 256, 100),
    ):  # fmt: skip
        x, weight = torch.zeros(rows, inner, dtype=dtype), torch.zeros(columns, inner, dtype=dtype)
        name = f"[{rows}, {inner}] {dtype}"
        norm, bias = (torch.ones(inner, dtype=dtype), 1e-5), weight[:, 0].clone()
        yield f"{name}, plain", partial(decode.row_product, x, weight, residual=torch.zeros(rows, columns, dtype=dtype))
        yield f"{name}, norm", partial(decode.row_product, x, weight, bias, norm=norm)
        yield f"{name}, gated", partial(decode.row_product, x, weight, bias, norm=(None, 1e-5), activation="silu")
        yield f"{name}, sum", partial(decode.add_norm, x, x, norm[0], 1e-5)
        yield f"{name}, branches", partial(decode.gated, x, "silu")


def row_cases() -> Iterator[tuple[str, Case]]:
    """Yield norms and losses."""
    from hgrn2.ops.triton import cross_entropy, norm

    for dtype in (LOW, FLOAT32):
        for width in (2048,) if dtype == LOW else (1, 100):
            for weight in (None, torch.ones(width)):
                x, factor = torch.zeros(70, width, dtype=dtype), torch.zeros(70)
                name = f"width {width} {dtype} weight {weight is not None}"
                yield name, partial(norm.forward, x, weight, 1e-5, LOW)
                yield name, partial(norm.backward, x, x, weight, factor, weight is not None)
        for writes in (True, False):
            logits, targets = torch.zeros(3, 1000, dtype=dtype), torch.zeros(3, dtype=torch.int64)
            yield f"{dtype} {writes}", partial(cross_entropy.cross_entropy_, logits, targets, 997, -100, writes)


def linear_cases() -> Iterator[tuple[str, Case]]:
    """Yield element-wise recurrences: real, complex and rotated ones, whole, cut and packed."""
    from hgrn2.ops.triton import linear_launch

    def both(a: Tensor, b: Tensor, turn: Tensor | None, initial: Tensor | None, bounds: Tensor | None, back: bool):
        h, final = linear_launch.forward(a, b, turn, initial, bounds, back)
        linear_launch.backward(a, h, turn, initial, bounds, back, torch.zeros_like(h), final, b.dtype)

    for kind, way in (
        ("real", "packed"), ("complex", "whole"), ("complex", "cut"), ("rotated", "packed"), ("bfloat16", "cut"),
    ):  # fmt: skip
        # one multiprocessor is assumed, which few channels do not fill
        shape, is_packed = (3, 70, 64) if way == "whole" else (1, 700, 16), way == "packed"
        real = torch.zeros(shape, dtype=LOW if kind == "bfloat16" else FLOAT32)
        pairs = torch.zeros(*shape, 2)
        b = real if kind in ("real", "bfloat16") else pairs
        turn = torch.zeros(shape[-1], 2) if kind == "rotated" else None
        initial = None if way == "cut" else torch.zeros(2 if is_packed else shape[0], *b.shape[2:])
        bounds = torch.tensor([0, 70, 700]) if is_packed else None
        a = pairs if kind == "complex" else real
        yield f"{kind}, {way}", partial(both, a, b, turn, initial, bounds, way != "whole")
    yield "one token", partial(both, *(torch.zeros(1, 1, 1),) * 2, None, None, None, False)


def selective_cases() -> Iterator[tuple[str, Case]]:
    """Yield Mamba's recurrence."""
    from hgrn2.ops.triton import selective_launch

    def both(shape: tuple[int, int, int], states: int, dtype: torch.dtype, bounds: Tensor | None, full: bool):
        u, b = torch.zeros(shape, dtype=dtype), torch.zeros(*shape[:2], states, dtype=dtype)
        call = selective_launch.Inputs(u, u, torch.zeros(shape[-1], states), b, b, bounds, full)
        sequences = call.num_sequences()
        kept = torch.zeros(shape[1] // 4 + sequences + 1, states, shape[-1])
        initial = torch.zeros(sequences, shape[-1], states) if full else None
        y, _ = selective_launch.forward(call, initial, kept if full else None, 4)
        selective_launch.backward(call, kept, y, initial, 4)

    yield "float32", partial(both, (2, 70, 64), 16, FLOAT32, None, False)
    yield "bfloat16, packed", partial(both, (1, 70, 64), 16, LOW, torch.tensor([0, 7, 70]), True)
    yield "one", partial(both, (1, 1, 1), 1, FLOAT32, None, True)


def scan_and_gradient(
    room: Any, plan: int, width: int, dtype: torch.dtype, is_packed: bool, settings: ScanSettings | None
) -> None:
    """Run a scan of the outer-product recurrence and its gradient.

    Args:
        room: module with `forward` and `backward` of a backend.
        plan: plan of the backend.
        width: K and V.
        dtype: dtype of the inputs.
        is_packed: whether sequences are packed, with states and bounds.
        settings: settings with a tied key, None for a free one.
    """
    x = torch.zeros(1, 200, 2, width, dtype=dtype)
    f, k = (torch.zeros(x.shape), x) if settings is None else (x, None)
    bound = torch.zeros(2, width) if settings is not None and is_packed else None
    bounds = torch.tensor([0, 7, 200]) if is_packed else None
    state = torch.zeros(2, 2, width, width) if is_packed else None
    call = ScanCall(x, f, k, x, bound, state, bounds, settings or ScanSettings())
    y, final, kept = room.forward(call, plan)
    room.backward(call, plan, kept, y, final, True)


# a setting that differs from its default in every field
EVERY_SETTING = ScanSettings(True, 0.5, "silu", "silu", -3.0)


def scan_cases() -> Iterator[tuple[str, Case]]:
    """Yield scans and steps of the outer-product recurrence."""
    from hgrn2.ops.backends.triton import launch

    def step(width: int, dtype: torch.dtype, has_bound: bool):
        x, state = torch.zeros(1, 2, width, dtype=dtype), torch.zeros(1, 2, width, width)
        bound = torch.zeros(2, width) if has_bound else None
        launch.step(ScanCall(x, x, None, x, bound, state, None, ScanSettings(q_activation="silu")), True)

    run = partial(scan_and_gradient, launch, 0)
    yield "tied, bfloat16", partial(run, 128, LOW, False, ScanSettings(q_activation="silu"))
    yield "free, float32, packed", partial(run, 64, FLOAT32, True, None)
    yield "tied, float16, packed, every setting", partial(run, 20, torch.float16, True, EVERY_SETTING)
    for width, dtype, has_bound in ((128, LOW, True), (20, FLOAT32, False)):
        yield f"step of width {width}", partial(step, width, dtype, has_bound)


def narrow_cases() -> Iterator[tuple[str, Case]]:
    """Yield scans of narrow heads."""
    from hgrn2.ops.backends.narrow import launch
    from hgrn2.ops.backends.narrow.tiles import BACKWARD, blocks_for

    for width, dtype, is_packed, settings in (
        (2, LOW, False, ScanSettings(q_activation="silu")), (16, FLOAT32, True, None),
        (5, torch.float16, True, EVERY_SETTING),
    ):  # fmt: skip
        run = partial(scan_and_gradient, launch, blocks_for(BACKWARD, width, width).tokens)
        yield f"width {width}, {dtype}", partial(run, width, dtype, is_packed, settings)


def adamw_cases() -> Iterator[tuple[str, Case]]:
    """Yield a step of AdamW with and without bfloat16 copies."""
    from hgrn2.train.device_adamw import DeviceAdamW

    def update(clip_norm: float):
        params = [torch.nn.Parameter(torch.zeros(3000)) for _ in range(2)]
        mixed = DeviceAdamW(torch.optim.AdamW(params), params[:1])
        with mixed.active():
            for p in params:
                p.grad = torch.zeros_like(p)
            mixed.step(torch.zeros(()), clip_norm)

    yield "clipped", partial(update, 0.5)
    # 1 is compiled into a kernel
    yield "clipped at 1", partial(update, 1)


def main() -> None:
    """Compile everything and print the results."""
    os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
    driver.set_active(NoGPU())
    # PTX is as far as this needs to go: the assembler would take most of the time
    CUDABackend.make_cubin = lambda *_, **__: b""
    compile_and_launch, results = JITFunction.run, []
    case = ""

    def compile_only(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        started, shared, problem = time.perf_counter(), 0, None
        try:
            shared = compile_and_launch(kernel, *args, grid=grid, warmup=True, **settings).metadata.shared
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        results.append({
            "kernel": _name(kernel), "case": case, "shared": shared, "problem": problem,
            "seconds": round(time.perf_counter() - started, 2),
        })  # fmt: skip

    JITFunction.run = compile_only
    for cases in (decode_cases, row_cases, linear_cases, selective_cases, scan_cases, narrow_cases, adamw_cases):
        for name, act in cases():
            case = name
            act()
    json.dump({"kernels": written_kernels(), "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
