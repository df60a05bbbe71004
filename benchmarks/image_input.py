"""Measure how many images a second the streamed input decodes, crops and augments, by threads.

    python benchmarks/image_input.py --out input.json

The images are JPEG files of 500 x 375 pixels, about the average of ImageNet, with noise whose spectrum is that of
photographs; they are made here.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import environment  # noqa: F401  (before torch)
import numpy as np
import torch
from PIL import Image

from hgrn2.models.vision import preset
from hgrn2.tasks.base import TaskContext
from hgrn2.tasks.image import ImageOptions, ImageTask

_CLASSES = 4


def make_images(folder: Path, count: int) -> int:
    """Write JPEG files whose spectrum falls as 1 / f, as that of photographs; return their bytes."""
    rng = np.random.default_rng(0)
    height, width = 375, 500
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequencies[0, 0] = 1
    total = 0
    for i in range(count):
        noise = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1)) / frequencies[..., None] ** 1.1
        values = np.fft.irfft2(noise, (height, width), axes=(0, 1))
        values = 128 + 50 * (values - values.mean()) / values.std()
        path = folder / str(i % _CLASSES) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        total += path.stat().st_size
    return total


def measure(folder: str, workers: int, batches: int) -> dict[str, float]:
    """Return images per second, and per second of a core, which other programs hardly change."""
    options = ImageOptions(data=folder, validation=folder, storage="stream", workers=workers, min_scale=0.08, flip=True)
    config = preset("hgrn2_vit_tiny", num_classes=_CLASSES)
    task = ImageTask(options, TaskContext(32, 0, torch.device("cpu"), config))
    task.next_batch()
    started, used = time.monotonic(), time.process_time()
    for _ in range(batches):
        task.next_batch()
    wall_s, cpu_s = time.monotonic() - started, time.process_time() - used
    return {"images_per_s": round(32 * batches / wall_s, 1), "images_per_core_s": round(32 * batches / cpu_s, 1)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batches", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = make_images(Path(folder), given.images)
        results = []
        for workers in given.workers:
            results.append({"workers": workers, **measure(folder, workers, given.batches)})
            print(json.dumps(results[-1]), flush=True)
    about = {"cores": os.cpu_count(), "bytes_per_image": num_bytes // given.images, "results": results}
    given.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
