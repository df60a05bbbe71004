import math

import pytest

from hgrn2.train import schedule
from hgrn2.train.config import TrainConfig
from hgrn2.train.settings import RunSettings


def test_warmup():
    assert [schedule.warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.warmup(0, 0) == 1.0


def test_cosine():
    # at a third of the way cos(60 degrees) = 1/2, so 0.1 + 0.9 * 3/4
    assert schedule.cosine(0.0, 0.1) == pytest.approx(1.0)
    assert schedule.cosine(1 / 3, 0.1) == pytest.approx(0.775)
    assert schedule.cosine(0.5, 0.1) == pytest.approx(0.55)
    assert schedule.cosine(1.0, 0.1) == pytest.approx(0.1)
    assert schedule.cosine(1.5, 0.1) == pytest.approx(0.1)


def test_wsd():
    assert [schedule.wsd(p, 0.2, 0.0) for p in (0.0, 0.5, 0.8)] == pytest.approx([1.0, 1.0, 1.0])
    assert schedule.wsd(0.9, 0.2, 0.0) == pytest.approx(0.5)
    assert schedule.wsd(0.9, 0.2, 0.1) == pytest.approx(0.55)
    assert schedule.wsd(1.0, 0.2, 0.1) == pytest.approx(0.1)


def test_inverse_sqrt():
    assert schedule.inverse_sqrt(99, 100) == 1.0
    assert schedule.inverse_sqrt(399, 100) == pytest.approx(0.5)
    assert schedule.inverse_sqrt(899, 100) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["cosine", "wsd", "inverse-sqrt", "constant"])
def test_lr_fraction_is_the_product_of_warmup_and_shape(name):
    config = TrainConfig(max_steps=1000, schedule=name, warmup_steps=10)
    at = {step: schedule.lr_fraction(config, step, step / 1000) for step in (0, 9, 39, 500, 900)}
    wanted = {
        "cosine": [0.1, 0.1 + 0.45 * (1 + math.cos(math.pi * 0.009)), None, 0.55, None],
        "wsd": [0.1, 1.0, 1.0, 1.0, 0.55],
        "inverse-sqrt": [0.1, 1.0, 0.5, math.sqrt(10 / 501), math.sqrt(10 / 901)],
        "constant": [0.1, 1.0, 1.0, 1.0, 1.0],
    }[name]
    for found, expected in zip(at.values(), wanted, strict=True):
        assert expected is None or found == pytest.approx(expected)


def test_a_short_run_is_not_all_warmup():
    timed = TrainConfig(max_time_s=60, schedule="constant")
    assert schedule.lr_fraction(timed, 0, 0.0) == 0.01
    # thirty steps fill the minute
    assert [schedule.lr_fraction(timed, step, step / 30) for step in (1, 3, 29)] == pytest.approx([1 / 3, 1.0, 1.0])
    # a thousand do
    assert schedule.lr_fraction(timed, 49, 0.049) == 0.5
    assert RunSettings.from_flat({"max_tokens": 16 * 1024 * 30}).num_warmup_steps == 3
    assert TrainConfig(max_tokens=10**9).num_warmup_steps == 100
