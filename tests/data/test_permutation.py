from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgrn2.data.permutation import Permutation, keyed_integer


@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_is_a_bijection(size, key):
    order = Permutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


@given(size=st.integers(1, 2**50), key=st.integers(0, 2**63), data=st.data())
def test_random_access_agrees_with_batches_and_stays_in_range(size, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    permutation = Permutation(size, key)
    images = permutation(index)
    assert ((images >= 0) & (images < size)).all()
    assert [int(permutation(np.array([i]))[0]) for i in index] == images.tolist()


def test_known_values_never_change():
    # a saved position is worth nothing if the order behind it moves between releases
    assert Permutation(1000, 7)(np.arange(5)).tolist() == [678, 622, 349, 860, 675]
    assert keyed_integer("split", 0, "a.txt") == 7171678424222312551


@pytest.mark.parametrize("size", [100, 1000, 1024, 1025])
def test_orders_look_random(size):
    first, second = (Permutation(size, key)(np.arange(size)) for key in (1, 2))
    # correlations of random orders are about size ** -0.5
    for a, b in [(first, np.arange(size)), (first, second), (first[:-1], first[1:])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / size**0.5
