"""Image sets: every format gives the pixels that were written; bad files are refused or counted."""

import numpy as np
import pytest
from PIL import Image

from hgrn2.data.images import Augmentation, decode_set, guess_channels, open_sets
from hgrn2.data.images.arrays import read_idx
from hgrn2.data.images.decode import open_image, resize_and_crop, to_pixels
from hgrn2.data.images.open_sets import read_parts
from hgrn2.data.images.stream import Decoder, Prefetcher
from tests.data import image_files as files
from tests.refusals import refuses


def opened(folder, validation=None):
    # files of a folder change in these tests
    read_parts.cache_clear()
    return open_sets(str(folder), validation, 0.25, 0)


def test_a_folder_of_classes_is_split_by_class(tmp_path):
    train, held_out = opened(files.image_folder(tmp_path / "d"))
    assert train.classes == held_out.classes == ("ant", "bee", "cat")
    assert np.bincount(train.labels).tolist() == [3, 3, 3]
    assert np.bincount(held_out.labels).tolist() == [1, 1, 1]
    names = {train.names(i) for i in range(len(train))} | {held_out.names(i) for i in range(len(held_out))}
    assert names == {f"{c}/{i}.png" for c in train.classes for i in range(4)}
    decoded = decode_set(train, (8, 8), 3, 2, "d")
    for i in range(len(train)):
        own = int(train.names(i)[4:-4])
        wanted = files.pixels(4, seed=int(train.labels[i]))[own]
        assert np.array_equal(decoded.images[i], wanted.transpose(2, 0, 1))


def test_a_folder_with_parts(tmp_path):
    files.image_folder(tmp_path / "d/train")
    files.image_folder(tmp_path / "d/val", each=2, seed=9)
    train, held_out = opened(tmp_path / "d")
    assert (len(train), len(held_out)) == (12, 6)
    other = files.image_folder(tmp_path / "e", each=1)
    assert len(opened(tmp_path / "d", str(other))[1]) == 3


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_idx_files(tmp_path, suffix):
    train, held_out = opened(files.idx_folder(tmp_path / "d", suffix))
    assert np.array_equal(train.images[:, 0], files.pixels(channels=1)[..., 0])
    assert np.array_equal(held_out.images[:, 0], files.pixels(channels=1, seed=1)[..., 0])
    assert train.labels.tolist() == files.labels().tolist()
    assert guess_channels(train) == 1
    (tmp_path / "d/classes.txt").write_text("a\nb\nc\n")
    read_parts.cache_clear()
    assert opened(tmp_path / "d")[0].classes == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["bin", "pickle"])
def test_cifar_files(tmp_path, kind):
    train, held_out = opened(files.cifar_folder(tmp_path / "d", kind))
    wanted = np.concatenate([files.pixels(size=(32, 32), seed=seed) for seed in (0, 1)])
    assert np.array_equal(train.images, wanted.transpose(0, 3, 1, 2))
    assert np.array_equal(held_out.images, files.pixels(size=(32, 32), seed=2).transpose(0, 3, 1, 2))


def test_a_pickle_that_runs_programs_is_refused(tmp_path):
    files.cifar_folder(tmp_path / "d", "pickle")
    (tmp_path / "d/test_batch").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with refuses("unsupported", "test_batch", "system"):
        opened(tmp_path / "d")


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_hugging_face_sets(tmp_path, saved):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    images = [Image.fromarray(x) for x in files.pixels()]
    table = datasets.Dataset.from_dict({"image": images, "label": files.labels().tolist()}, features=features)
    if saved == "disk":
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "d"))
    else:
        (tmp_path / "d").mkdir()
        table.to_parquet(str(tmp_path / "d/train-00000-of-00001.parquet"))
        table.to_parquet(str(tmp_path / "d/test-00000-of-00001.parquet"))
    train, held_out = opened(tmp_path / "d")
    assert train.classes == ("x", "y", "z")
    assert train.labels.tolist() == files.labels().tolist()
    decoded = decode_set(held_out, (8, 8), 3, 2, "d").images
    assert np.array_equal(decoded, files.pixels().transpose(0, 3, 1, 2))


@pytest.mark.parametrize("has_names", [True, False])
def test_hugging_face_sets_with_missing_labels(tmp_path, has_names):
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["x", "y"]) if has_names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    images = [Image.fromarray(x) for x in files.pixels(4)]
    (tmp_path / "d").mkdir()
    table = datasets.Dataset.from_dict({"image": images, "label": [0, None, 1, None]}, features=features)
    table.to_parquet(str(tmp_path / "d/train.parquet"))
    with refuses("invalid-value", "train", "image 1", "2 such"):
        opened(tmp_path / "d")


def test_unusual_files_become_eight_bit_rgb_or_grey(tmp_path):
    rgb = files.pixels(1)[0]

    def read(name, image, **how):
        image.save(tmp_path / name, **how)
        return np.asarray(open_image(tmp_path / name))

    colours = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(read("palette.png", colours), np.asarray(colours.convert("RGB")))
    cmyk = Image.fromarray(rgb).convert("CMYK")
    assert np.array_equal(read("cmyk.tiff", cmyk), np.asarray(cmyk.convert("RGB")))
    wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    assert np.array_equal(read("sixteen.png", Image.fromarray(wide)), (wide >> 8).astype(np.uint8))
    clear = np.concatenate([rgb, np.zeros((8, 8, 1), np.uint8)], 2)
    assert (read("clear.png", Image.fromarray(clear, "RGBA")) == 255).all()
    opaque = np.concatenate([rgb, np.full((8, 8, 1), 255, np.uint8)], 2)
    assert np.array_equal(read("opaque.png", Image.fromarray(opaque, "RGBA")), rgb)
    grey = Image.fromarray(rgb[..., 0])
    assert np.array_equal(read("grey.png", grey), rgb[..., 0])
    bits = Image.fromarray(rgb[..., 0] > 127)
    assert set(np.unique(read("bits.png", bits))) <= {0, 255}
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    assert read("turned.jpg", turned, exif=exif).shape == (4, 2, 3)


def test_files_that_cannot_be_read(tmp_path):
    image = Image.fromarray(files.pixels(1, (64, 64))[0])
    image.save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    for name, content in (("cut.jpg", whole[: len(whole) // 2]), ("empty.png", b""), ("text.png", b"not an image")):
        (tmp_path / name).write_bytes(content)
        with refuses("damaged"):
            open_image(tmp_path / name)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with refuses("unsupported"):
        open_image(tmp_path / "float.tiff")


def test_unreadable_images_are_counted_and_left_out(tmp_path):
    folder = files.image_folder(tmp_path / "d")
    (folder / "ant/0.png").write_bytes(b"broken")
    (folder / "bee/notes.txt").write_text("no image")
    train, _ = open_sets(str(folder), str(folder), 0.25, 0)
    decoded = decode_set(train, (8, 8), 3, 2, "d")
    assert (len(decoded), decoded.skipped) == (11, {"damaged": 1})
    assert "ant/0.png" not in [decoded.names(i) for i in range(11)]
    for i in range(4):
        (folder / f"ant/{i}.png").write_bytes(b"broken")
    with refuses("incomplete", "ant"):
        decode_set(train, (8, 8), 3, 2, "d")
    for i in range(4):
        (folder / f"bee/{i}.png").write_bytes(b"broken")
    with refuses("unreadable", "8 of 12"):
        decode_set(train, (8, 8), 3, 2, "d")


def test_other_sizes_cover_the_wanted_one():
    image = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None], 10, 0))
    found = np.asarray(resize_and_crop(image, (10, 10)))
    # the centre of the long side
    assert np.array_equal(found[0], np.arange(15, 25))
    assert to_pixels(resize_and_crop(image, (6, 12)), 3).shape == (3, 6, 12)


def test_mistakes(tmp_path):
    with refuses("not-found", "nowhere"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refuses("not-found", "empty"):
        opened(tmp_path / "empty")
    folder = files.image_folder(tmp_path / "a")
    (folder / "dog").mkdir()
    with refuses("incomplete", "dog"):
        opened(folder)
    files.image_folder(tmp_path / "b/train")
    files.image_folder(tmp_path / "b/val", ("ant", "bee", "dog"))
    with refuses("mismatch", "cat", "dog"):
        opened(tmp_path / "b")
    folder = files.idx_folder(tmp_path / "c")
    name = "t10k-labels-idx1-ubyte"
    (folder / name).write_bytes(files.idx_bytes(np.arange(files.NUM, dtype=np.uint8)))
    with refuses("invalid-value", "label 3 of image 3", name):
        opened(folder)
    (folder / name).write_bytes(files.idx_bytes(files.labels(files.NUM - 1)))
    with refuses("mismatch", "t10k"):
        opened(files.idx_folder(tmp_path / "g") and folder.rename(tmp_path / "h"))
    (tmp_path / "short").write_bytes(files.idx_bytes(files.labels())[:-1])
    with refuses("damaged", "short"):
        read_idx(tmp_path / "short")
    (tmp_path / "sizes").write_bytes(b"\0\0\x08\3\0")
    with refuses("damaged", "sizes", "5 bytes"):
        read_idx(tmp_path / "sizes")
    (tmp_path / "huge").write_bytes(b"\0\0\x08\3" + b"\xff" * 12)
    with refuses("damaged", "huge", 2**32 - 1):
        read_idx(tmp_path / "huge")
    (tmp_path / "other").write_bytes(b"PK\3\4 a zip file")
    with refuses("unreadable", "other"):
        read_idx(tmp_path / "other")
    folder = files.cifar_folder(tmp_path / "e")
    (folder / "test_batch.bin").write_bytes(b"\0" * 3074)
    with refuses("damaged", "test_batch.bin"):
        opened(folder)


def test_labels_of_cifar_that_no_class_has(tmp_path):
    folder = files.cifar_folder(tmp_path / "d")
    rows = bytearray((folder / "test_batch.bin").read_bytes())
    rows[3073] = 200
    (folder / "test_batch.bin").write_bytes(rows)
    with refuses("invalid-value", "label 200 of image 1", "test_batch.bin"):
        opened(folder)


def test_class_names_that_are_no_text(tmp_path):
    folder = files.idx_folder(tmp_path / "d")
    (folder / "classes.txt").write_bytes(b"a\nb\n\xff\xfe\n")
    with refuses("unreadable", "classes.txt"):
        opened(folder)


def test_classes_of_one_image_have_none_to_hold_out(tmp_path):
    folder = files.image_folder(tmp_path / "d", each=1)
    with refuses("incomplete", "3 classes", "--validation"):
        opened(folder)
    train, held_out = opened(folder, str(folder))
    assert (len(train), len(held_out)) == (3, 3)


def test_streamed_images_are_cropped_and_bad_ones_replaced(tmp_path):
    folder = files.image_folder(tmp_path / "d", size=(16, 24))
    (folder / "ant/1.png").write_bytes(b"broken")
    found, _ = open_sets(str(folder), str(folder), 0.25, 0)
    decoder = Decoder(found, (8, 8), 3, min_scale=0.1)
    first, label = decoder(1, (0, 1))
    assert (first.shape, label, decoder.skipped) == ((3, 8, 8), 0, 1)
    assert np.array_equal(first, decoder(2, (0, 1))[0])
    assert not np.array_equal(first, decoder(2, (0, 2))[0])
    middle = Decoder(found, (8, 8), 1)(2, (0,))[0]
    assert np.array_equal(middle, to_pixels(resize_and_crop(found.read(2), (8, 8)), 1))


def test_batches_come_in_order_and_again_from_any_place():
    prefetcher = Prefetcher(lambda n: [lambda i=i: (n, i) for i in range(3)], 2)
    for number in (0, 1, 2, 7, 8, 3):
        assert prefetcher.take(number) == [(number, i) for i in range(3)]


def test_settings_of_augmentation():
    with refuses("invalid-value", "strength"):
        Augmentation(strength=2)
    assert not Augmentation(mixup=0.2, mix_share=0).mixes
