import numpy as np
import pytest

from surgeon.store import SymmetricMatrix, pack_symmetric, unpack_symmetric
from surgeon.store.symmetric import triangle_side, triangle_size


@pytest.mark.parametrize("n", [0, 1, 2, 5, 511, 512, 513, 1300])
def test_packing_agrees_with_indices(n):
    matrix = np.random.default_rng(n).standard_normal((n, n)).astype(np.float32)
    lower = np.tril(matrix)

    packed = pack_symmetric(matrix)
    full = unpack_symmetric(packed)

    np.testing.assert_array_equal(packed, matrix[np.tril_indices(n)])
    np.testing.assert_array_equal(full, lower + np.tril(matrix, -1).T)


def test_bits_survive():
    n = 600
    matrix = np.random.default_rng(0).integers(0, 2**32, (n, n), dtype=np.uint32).view(np.float32)
    matrix[3, 1], matrix[4, 4], matrix[599, 2] = -0.0, np.nan, -np.inf

    full = unpack_symmetric(pack_symmetric(matrix)).view(np.uint32)

    np.testing.assert_array_equal(full, full.T)
    np.testing.assert_array_equal(np.tril(full), np.tril(matrix.view(np.uint32)))


def test_upper_triangle_and_strides_do_not_matter():
    matrix = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    changed = matrix.copy()
    changed[np.triu_indices(40, 1)] = np.nan

    np.testing.assert_array_equal(pack_symmetric(changed), pack_symmetric(np.asfortranarray(matrix)))


def test_wrapper():
    matrix = SymmetricMatrix.from_full(np.array([[1, 9], [2, 3]], dtype=np.float32))

    assert matrix.n == 2
    np.testing.assert_array_equal(matrix.to_full(), [[1, 2], [2, 3]])


@pytest.mark.parametrize("n", [0, 1, 2, 4096, 10**8])
def test_side_of_triangle(n):
    assert triangle_side(triangle_size(n)) == n


def test_what_is_no_triangle_is_refused():
    with pytest.raises(ValueError, match="got 5; the nearest n is 2"):
        SymmetricMatrix(np.zeros(5, dtype=np.float32))
    with pytest.raises(ValueError, match=r"float32 vector, but got float32\[2,2\]|got float32\[2, 2\]"):
        SymmetricMatrix(np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match=r"square matrix can be packed, but the shape is \[2, 3\]"):
        pack_symmetric(np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(TypeError, match="the dtype is float64"):
        pack_symmetric(np.zeros((2, 2)))  # type: ignore[arg-type]
