"""Time training steps of image models, HGRN2 beside HGRN1 and a plain ViT of the same size, in one process.

    python benchmarks/vision.py --data FOLDER --out vision.json

Every model runs the same task: the same batches, augmentation, optimizer and precision.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before torch)
import torch

from hgrn2.models.vision import VisionModel, preset
from hgrn2.tasks.base import TaskContext
from hgrn2.tasks.image import ImageOptions, ImageTask
from hgrn2.train.config import TrainConfig
from hgrn2.train.counters import Counters
from hgrn2.train.environment import describe_environment
from hgrn2.train.optim import NamedOptimizer
from hgrn2.train.parallel import ONE_PROCESS
from hgrn2.train.stepper import Stepper

# name in the table: preset and changes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("plain_cct_small", {}),
    "hgrn2 alternating-2d, heads of 64": ("hgrn2_cct_small", {}),
    "hgrn2 alternating-2d, heads of 128": ("hgrn2_cct_small", {"mixers": {"hgrn2": {"expand_ratio": 128}}}),
    "hgrn2 alternating-2d, heads of 32": ("hgrn2_cct_small", {"mixers": {"hgrn2": {"expand_ratio": 32}}}),
    "hgrn2 alternating, heads of 64": ("hgrn2_cct_small", {"directions": "alternating"}),
    "hgrn2 bidirectional, heads of 64": ("hgrn2_cct_small", {"directions": "bidirectional"}),
    "hgrn2 2d, heads of 64": ("hgrn2_cct_small", {"directions": "2d"}),
    "hgrn1 alternating-2d": ("hgrn1_cct_small", {}),
}


def time_steps(name: str, options: ImageOptions, train: TrainConfig, patch_size: int, steps: int) -> dict[str, Any]:
    """Return parameters, milliseconds per step and images per second of a model."""
    device = torch.device(train.device)
    of_data = ImageTask.model_settings(options)
    base, changes = MODELS[name]
    config = preset(base, **of_data, **changes, patch_size=patch_size, drop_path_rate=0.1)
    torch.manual_seed(0)
    model = VisionModel(config).to(device)
    if train.compile:
        model.compile_blocks()
    task: Any = ImageTask(options, TaskContext(train.batch_size, 0, device, config))
    optimizer = NamedOptimizer(model, model.parameter_roles(), train)
    stepper = Stepper(model, task, optimizer, train, ONE_PROCESS)
    counters, times = Counters(), []

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with optimizer.working_precision():
        stepper.begin()
        started = time.monotonic()
        # kernels are compiled, and the step is captured
        for _ in range(8):
            stepper.run(counters, 0.0).wait()
        first_s = time.monotonic() - started
        for _ in range(5):
            synchronize()
            started = time.monotonic()
            for _ in range(steps):
                launched = stepper.run(counters, 0.0)
            launched.wait()
            synchronize()
            times.append((time.monotonic() - started) / steps)
    best = min(times)
    return {
        "model": name, "parameters": sum(p.numel() for p in model.parameters()), "patch_size": patch_size,
        "ms_per_step": round(1e3 * best, 3), "spread_ms": round(1e3 * (max(times) - best), 3),
        "images_per_s": round(train.batch_size / best), "first_steps_s": round(first_s, 1),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark; write each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    given = parser.parse_args()
    is_gpu = given.device.startswith("cuda")
    options = ImageOptions(
        data=given.data, crop_padding=4, flip=True, strength=0.5, erase=0.25, mixup=0.8, cutmix=1.0,
        label_smoothing=0.1, ema_decay=0.999,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = TrainConfig(
            max_steps=1000, batch_size=given.batch_size, device=given.device, compile=is_gpu, cuda_graph=is_gpu,
            precision="bfloat16" if is_gpu else "float32",
        )  # fmt: skip
    results = []
    for patch_size in given.patch_sizes:
        vit = None
        for name in given.models:
            try:
                row = time_steps(name, options, train, patch_size, given.steps)
            except (RuntimeError, ValueError) as error:
                row = {"model": name, "patch_size": patch_size, "error": str(error).strip().splitlines()[0]}
            else:
                vit = row["ms_per_step"] if name == "vit" else vit
                row["ratio_to_vit"] = None if vit is None else round(row["ms_per_step"] / vit, 3)
            results.append(row)
            print(json.dumps(row), flush=True)
            given.out.write_text(
                json.dumps(
                    {"environment": describe_environment(torch.device(given.device)), "results": results}, indent=1
                )
                + "\n"
            )


if __name__ == "__main__":
    main()
