"""Small image sets in every format, for tests."""

import gzip
import lzma
import pickle

import numpy as np

NUM = 12


def pixels(count=NUM, size=(8, 8), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def labels(count=NUM, num_classes=3):
    return np.arange(count, dtype=np.uint8) % num_classes


def image_folder(folder, classes=("ant", "bee", "cat"), each=4, size=(8, 8), mode="RGB", suffix="png", seed=0):
    from PIL import Image

    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, x in enumerate(pixels(each, size, 3, seed + c)):
            Image.fromarray(x).convert(mode).save(folder / name / f"{i}.{suffix}")
    return folder


def idx_bytes(array):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def idx_folder(folder, suffix="", count=NUM, size=(8, 8), num_classes=3):
    folder.mkdir(parents=True, exist_ok=True)
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    for seed, part in enumerate(("train", "t10k")):
        x, y = pixels(count, size, 1, seed)[..., 0], labels(count, num_classes)
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(compress(idx_bytes(x)))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(compress(idx_bytes(y)))
    return folder


def cifar_rows(count=NUM, seed=0, num_classes=3):
    x = pixels(count, (32, 32), 3, seed).transpose(0, 3, 1, 2).reshape(count, -1)
    return labels(count, num_classes), x


def cifar_folder(folder, kind="bin"):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        y, x = cifar_rows(seed=seed)
        if kind == "bin":
            (folder / f"{name}.bin").write_bytes(np.concatenate([y[:, None], x], 1).tobytes())
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": x, b"labels": y.tolist()}, protocol=2))
    return folder
