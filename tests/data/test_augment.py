"""Augmentation: every operation by a plain loop or Pillow, and the statistics of what is drawn."""

import numpy as np
import pytest
import torch

from hgrn2.data.images import Augmentation, augment

MEAN, STD = torch.zeros(3), torch.ones(3)


def images(count=6, size=(8, 10), seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, *size), dtype=np.uint8))


def drawn(settings, count=6, size=(8, 10), seed=0):
    found = settings.draw(np.random.default_rng(seed), count, size)
    found.pop("own_share", None)
    return found


def test_nothing_is_changed_by_default():
    x = images()
    assert drawn(Augmentation()) == {}
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    wanted = (x.double() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(augment(x, mean, std).double(), wanted, rtol=1e-5, atol=1e-6)


def test_shift_and_mirror_by_a_loop_over_pixels():
    x, settings = images(20), Augmentation(crop_padding=2, flip=True)
    affine = drawn(settings, 20)["affine"]
    found = augment(x, MEAN, STD, affine=affine)
    height, width = x.shape[2:]
    seen = set()
    for i in range(20):
        mirror = float(affine[i, 0, 0])
        # in pixels, of the input for an output pixel
        dy, dx = round(float(affine[i, 1, 2]) * height / 2), round(float(affine[i, 0, 2]) * width / 2)
        seen.add((mirror, dy, dx))
        for row in range(height):
            for column in range(width):
                at = column if mirror > 0 else width - 1 - column
                source = [row + dy, at + dx]
                for axis, size in enumerate((height, width)):
                    if source[axis] < 0:
                        source[axis] = -source[axis] - 1
                    if source[axis] >= size:
                        source[axis] = 2 * size - 1 - source[axis]
                wanted = x[i, :, source[0], source[1]].float() / 255
                torch.testing.assert_close(found[i, :, row, column], wanted, rtol=0, atol=1e-4)
    assert len(seen) > 10
    assert {mirror for mirror, _, _ in seen} == {-1.0, 1.0}


def test_a_turn_keeps_squares_of_a_wide_image():
    x = torch.zeros(1, 3, 40, 80, dtype=torch.uint8)
    x[:, :, 10:30, 30:50] = 255
    turn = torch.tensor([[[0.0, -40 / 80, 0.0], [80 / 40, 0.0, 0.0]]])
    middle = slice(20, 60)
    found = augment(x, MEAN, STD, affine=turn)[..., middle]
    torch.testing.assert_close(found, x[..., middle].float() / 255, rtol=0, atol=1e-3)


def test_drawn_turns_are_turns_in_pixels():
    height, width = 8, 16
    affine = drawn(Augmentation(strength=1.0), 300, (height, width))["affine"][:, :, :2].double()
    to_pixels = torch.tensor([width, height]).double()
    pixels = to_pixels[:, None] * affine / to_pixels
    turned = pixels[(pixels[:, 0, 1] * pixels[:, 1, 0]) != 0]
    assert 20 < len(turned) < 100
    wanted = torch.eye(2).double().expand_as(turned)
    torch.testing.assert_close(turned @ turned.transpose(1, 2), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "factor", "enhance"), [(0, 1.5, "Brightness"), (1, 0.3, "Color"), (2, 1.7, "Contrast")]
)
def test_colours_by_pillow(place, factor, enhance):
    image_module = pytest.importorskip("PIL.Image")
    from PIL import ImageEnhance

    x = images(1)
    colours = torch.tensor([[1.0, 1, 1, 1, 256, 2]])
    colours[0, place] = factor
    found = augment(x, MEAN, STD, colours=colours)[0] * 255
    image = image_module.fromarray(x[0].permute(1, 2, 0).numpy())
    wanted = torch.from_numpy(np.array(getattr(ImageEnhance, enhance)(image).enhance(factor))).permute(2, 0, 1)
    # Pillow rounds grey values, and the mean of them
    assert float((found - wanted).abs().max()) < 3


def test_levels_and_threshold():
    x = images(1)
    few = augment(x, MEAN, STD, colours=torch.tensor([[1.0, 1, 1, 1, 8, 2]]))
    assert len(few.unique()) <= 9
    assert float((few - x / 255).abs().max()) <= 1 / 8 + 1e-6
    inverted = augment(x, MEAN, STD, colours=torch.tensor([[1.0, 1, 1, 1, 256, 0.5]]))
    plain = x.float() / 255
    torch.testing.assert_close(inverted, torch.where(plain >= 0.5, 1 - plain, plain))


def test_neutral_colours_change_nothing():
    x = images(2)
    colours = torch.tensor([[1.0, 1, 1, 1, 256, 2]]).expand(2, 6)
    torch.testing.assert_close(augment(x, MEAN, STD, colours=colours), x.float() / 255, rtol=0, atol=1e-5)


def test_erased_and_mixed_pixels_by_a_loop():
    x = images(4)
    erased = torch.tensor([[0.0, 0, 0, 0], [2, 5, 1, 4], [0, 8, 0, 10], [0, 0, 0, 0]])
    weight = torch.tensor([1.0, 0.25, 1, 0.5])
    cut = torch.tensor([[1.0, 3, 2, 6], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = augment(x, MEAN, STD, erased=erased, own_weight=weight, cut=cut)
    plain = x.float() / 255
    for i, (top, bottom, left, right) in enumerate(erased.int().tolist()):
        plain[i, :, top:bottom, left:right] = 0
    mixed = [plain[i] * weight[i] + plain[3 - i] * (1 - weight[i]) for i in range(4)]
    wanted = torch.stack(mixed)
    # the other image as it was before it was mixed
    wanted[0, :, 1:3, 2:6] = plain[3][:, 1:3, 2:6]
    torch.testing.assert_close(found, wanted)


def test_shares_of_mixed_images_are_those_of_their_pixels():
    settings = Augmentation(mixup=0.8, cutmix=1.0, mix_share=0.5)
    count, size = 400, (16, 16)
    found = settings.draw(np.random.default_rng(0), 2 * count, size)
    own = found.pop("own_share")
    # pixels of the first half are 1, those of the other images 0; these are mixed as well
    x = torch.full((2 * count, 3, *size), 255, dtype=torch.uint8)
    x[count:] = 0
    left = augment(x, MEAN, STD, **found).mean((1, 2, 3))
    torch.testing.assert_close(left[:count], own[:count], rtol=0, atol=1e-5)
    torch.testing.assert_close(1 - left[count:], own[count:], rtol=0, atol=1e-5)
    assert 0.4 < float((own < 1).float().mean()) < 0.6


def test_draws_follow_the_generator():
    settings = Augmentation(2, True, 0.5, 0.5, 0.5, 0.2, 1.0)
    again, other = drawn(settings), drawn(settings, seed=1)
    assert all(torch.equal(x, again[name]) for name, x in drawn(settings).items())
    assert any(not torch.equal(x, other[name]) for name, x in again.items())


def test_random_crops_stay_inside():
    affine = drawn(Augmentation(min_scale=0.1), 500)["affine"]
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]]).T
    assert float((affine @ corners).abs().max()) <= 1 + 1e-5
    area = affine[:, 0, 0] * affine[:, 1, 1]
    assert 0.05 < float(area.min()) < 0.3
