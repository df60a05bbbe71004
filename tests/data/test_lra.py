"""Readers of Long Range Arena's files, and Pathfinder images."""

import lzma
import struct
from pathlib import Path

import numpy as np
import pytest

from hgrn2.data.lra.images import read_cifar
from hgrn2.data.lra.pathfinder import draw_block
from hgrn2.data.lra.pathfinder_set import pathfinder_set, read_official_pathfinder
from hgrn2.data.lra.text import read_pairs, read_reviews
from tests.refusals import refuses


def test_reviews_from_lines_and_from_folders_agree(tmp_path):
    reviews = [("bad", 0), ("good é", 1), ("x" * 50, 1)]
    lines = "\n".join(f'["{text}", {label}, "name"]' for text, label in [*reviews, ("none", -1)])
    for name, opened in (("plain", open), ("packed", lzma.open)):
        (tmp_path / name).mkdir()
        with opened(
            tmp_path / name / f"train.jsonl{'.xz' if name == 'packed' else ''}", "wt", encoding="utf-8"
        ) as file:
            file.write(lines)
    for number, (text, label) in enumerate(reviews):
        folder = tmp_path / "official" / "train" / ("pos" if label else "neg")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}_7.txt").write_text(text, encoding="utf-8")
    for name in ("plain", "packed", "official"):
        found = read_reviews(tmp_path / name, "train", 20)
        assert found.labels.tolist() == [0, 1, 1]
        assert found.lengths.tolist() == [3, 7, 20]
        assert bytes(found.inputs[1, :7]) == "good é".encode()
        assert not found.inputs[0, 3:].any()
        assert found.notes["cut"] == 1
    assert read_reviews(tmp_path / "plain", "train", 20).notes["unlabelled"] == 1


def test_wrong_reviews_are_refused(tmp_path):
    path = tmp_path / "train.jsonl"
    with refuses("not-found", "train.jsonl"):
        read_reviews(tmp_path, "train", 20)
    for content, code, names in (
        ('["a", 2]', "mismatch", ("line 1", 2)),
        ('["a", 0]\n{"text": "b"}', "damaged", ("line 2",)),
        ('["a", 0]', "not-found", ("positive",)),
        ("", "not-found", (path,)),
        ('["a", true]', "mismatch", ("line 1",)),
        ('["a", 0]\n[3, 1]', "damaged", ("line 2", 3)),
    ):
        path.write_text(content)
        with refuses(code, *names):
            read_reviews(tmp_path, "train", 20)
    path.unlink()
    packed = lzma.compress(b'["a", 0]\n' * 1000)
    (tmp_path / "train.jsonl.xz").write_bytes(packed[: len(packed) // 2])
    with refuses("damaged", "train.jsonl.xz"):
        read_reviews(tmp_path, "train", 20)


def test_pairs_of_papers(tmp_path):
    path = tmp_path / "new_aan_pairs.train.tsv"
    path.write_bytes(b"1.0\tP1\tP2\tb'caf\\xc3\\xa9'\tb\"it's\"\n0.0\tP1\tP3\tplain\xff\t" + b"y" * 30 + b"\n")
    found = read_pairs(path, 12)
    assert found.labels.tolist() == [1, 0]
    assert found.inputs.shape == (2, 2, 12)
    assert found.lengths.tolist() == [[5, 4], [6, 12]]
    assert bytes(found.inputs[0, 0, :5]) == "café".encode()
    assert bytes(found.inputs[0, 1, :4]) == b"it's"
    assert bytes(found.inputs[1, 0, :6]) == b"plain\xff"
    assert found.notes == {"cut": 1}
    with refuses("not-found", "nothing.tsv"):
        read_pairs(tmp_path / "nothing.tsv", 12)
    for line, code, names in (
        (b"1.0\tP1\tP2\ttext", "damaged", ("line 3", 4, 5)),
        (b"2.0\tP1\tP2\ta\tb", "mismatch", ("line 3", "2.0")),
        (b"x\tP1\tP2\ta\tb", "mismatch", ("line 3", "x")),
    ):
        path.write_bytes(b"1.0\tP1\tP2\ta\tb\n0.0\tP1\tP3\tc\td\n" + line + b"\n")
        with refuses(code, *names):
            read_pairs(path, 12)


def binary(path, labels):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    path.write_bytes(b"".join(struct.pack("B", y) + x.tobytes() for x, y in zip(images, labels, strict=True)))
    return images


def test_cifar_is_read_as_pixels(tmp_path):
    images = binary(tmp_path / "test_batch.bin", range(10))
    found = read_cifar(tmp_path, "test", is_grey=False)
    assert found.inputs.shape == (10, 1024, 3)
    assert (found.inputs[3, 32 * 5 + 7] == images[3, :, 5, 7]).all()
    grey = read_cifar(tmp_path, "test", is_grey=True)
    wanted = 0.2989 * images[3, 0, 5, 7] + 0.587 * images[3, 1, 5, 7] + 0.114 * images[3, 2, 5, 7]
    assert abs(int(grey.inputs[3, 32 * 5 + 7]) - wanted) <= 0.5
    np.savez(tmp_path / "train.npz", images=grey.inputs.reshape(-1, 32, 32), labels=grey.labels)
    again = read_cifar(tmp_path, "train", is_grey=True)
    assert (again.inputs == grey.inputs).all()
    with refuses("mismatch", tmp_path):
        read_cifar(tmp_path, "train", is_grey=False)


def test_wrong_cifar_is_refused(tmp_path):
    with refuses("not-found", "test_batch.bin"):
        read_cifar(tmp_path, "test", is_grey=True)
    path = tmp_path / "test_batch.bin"
    binary(path, range(10))
    path.write_bytes(path.read_bytes()[:-1])
    with refuses("damaged", "test_batch.bin", 3073):
        read_cifar(tmp_path, "test", is_grey=True)
    binary(path, [*range(9), 10])
    with refuses("mismatch", 10):
        read_cifar(tmp_path, "test", is_grey=True)
    binary(path, range(9))
    with refuses("not-found", "truck"):
        read_cifar(tmp_path, "test", is_grey=True)


def test_wrong_arrays_of_cifar_are_refused(tmp_path):
    path = tmp_path / "test.npz"
    images, labels = np.zeros((20, 32, 32), np.uint8), np.arange(20) % 10
    np.savez(path, images=images, labels=labels)
    assert read_cifar(tmp_path, "test", is_grey=True).labels.tolist() == labels.tolist()
    whole = path.read_bytes()
    for content in (b"PK nothing", b"PK\3\4 nothing", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with refuses("damaged", "test.npz"):
            read_cifar(tmp_path, "test", is_grey=True)
    # halves would be rounded down
    wrong = (labels + 0.5, labels[:5], labels.astype(str), np.int64(3), np.stack([labels, labels], 1))
    for found in wrong:
        np.savez(path, images=images, labels=found)
        with refuses("mismatch", "test.npz", np.asarray(found).dtype):
            read_cifar(tmp_path, "test", is_grey=True)


@pytest.fixture(scope="module")
def block():
    return draw_block(32, 0, 0)


def test_pathfinder_has_the_published_statistics(block):
    images = block.images.astype(float)
    # published for the 200,000 images of 32 x 32: mean 20.2, standard deviation 51, about 350 lit pixels
    assert 17 < images.mean() < 24
    assert 46 < images.std() < 56
    assert 300 < (images > 0).sum((1, 2)).mean() < 400
    assert (images.max((1, 2)) == 255).all()
    assert 0.4 < block.labels.mean() < 0.6


def test_pathfinder_has_two_visible_discs(block):
    # a disc of radius 1.5 lights 3 x 3 pixels; paddles are one pixel wide
    lit = block.images > 100
    windows = np.lib.stride_tricks.sliding_window_view(lit, (3, 3), (1, 2)).sum((3, 4))
    assert ((windows == 9).sum((1, 2)) >= 1).mean() > 0.99


def test_pathfinder_images_follow_from_seed_and_block(block):
    again = draw_block(32, 0, 0)
    assert (again.images == block.images).all()
    assert not (draw_block(32, 1, 0).images == block.images).all()
    with refuses("invalid-value", 48, 32):
        draw_block(48, 0, 0)


def test_a_set_is_drawn_once_and_checked(tmp_path, block):
    found = pathfinder_set(32, 100, 0, tmp_path, processes=1)
    assert (found.inputs.reshape(-1, 32, 32) == block.images[:100]).all()
    images = next(tmp_path.glob("*/images.npy"))
    written = images.stat().st_mtime_ns
    pathfinder_set(32, 100, 0, tmp_path, processes=1)
    assert images.stat().st_mtime_ns == written
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    with refuses("damaged", images.parent):
        pathfinder_set(32, 100, 0, tmp_path)
    images.write_bytes(content[:1000])
    with refuses("damaged", images.parent):
        pathfinder_set(32, 100, 0, tmp_path)


def test_official_pathfinder_files(tmp_path, block):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "imgs" / "0").mkdir(parents=True)
    lines = []
    for i in range(12):
        image.fromarray(block.images[i]).save(tmp_path / "imgs" / "0" / f"sample_{i}.png")
        lines.append(f"imgs/0 sample_{i}.png {i} {block.labels[i]} 1.8 14 4 5 1.5 2 1")
    (tmp_path / "imgs" / "0" / "sample_3.png").write_bytes(b"")
    cut = (tmp_path / "imgs" / "0" / "sample_7.png").read_bytes()
    (tmp_path / "imgs" / "0" / "sample_7.png").write_bytes(cut[: len(cut) // 2])
    table = Path(tmp_path / "metadata" / "0.npy")
    table.write_text("\n".join(lines))
    found = read_official_pathfinder(tmp_path, 32)
    assert found.notes == {"unreadable": 2}
    kept = [i for i in range(12) if i not in (3, 7)]
    assert (found.inputs == block.images[kept].reshape(10, -1)).all()
    assert found.labels.tolist() == block.labels[kept].tolist()
    with refuses("mismatch", "32 x 32", "64 x 64"):
        read_official_pathfinder(tmp_path, 64)
    table.write_text("imgs/0 sample_0.png 0 2")
    with refuses("damaged", "line 1"):
        read_official_pathfinder(tmp_path, 32)
    table.write_bytes(b"\x93NUMPY \xff\xfe")
    with refuses("damaged", "line 1"):
        read_official_pathfinder(tmp_path, 32)
