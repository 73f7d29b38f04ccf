"""Winograd's algorithm: its identity in exact fractions, its output against loops, and what must break it."""

from fractions import Fraction

import numpy as np
import pytest

import nn.winograd
from nn.conv import conv_backward, conv_forward
from nn.winograd import (
    POINTS,
    _Grid,
    _overlap_add,
    _windows,
    filter_transform,
    filter_transform_backward,
    transforms,
    winograd_forward,
)
from tests import reference
from tests.reference import error

# ---- the identity


def evaluation(coefficients, points=POINTS):
    """Values of a polynomial at the points, then its leading coefficient, as fractions."""
    rows = [[Fraction(p)**e for e in range(coefficients)] for p in points]
    return rows + [[Fraction(int(e == coefficients - 1)) for e in range(coefficients)]]


def inverse(matrix):
    """Gauss-Jordan in fractions."""
    n = len(matrix)
    rows = [list(row) + [Fraction(int(i == j)) for j in range(n)] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for r in range(n):
            if r != i:
                rows[r] = [a - rows[r][i] * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[n:] for row in rows]


def is_correlation(A, G, B):
    """Whether sum_p A[p][i] G[p][u] B[j][p] is exactly 1 where j = i + u and 0 elsewhere."""
    return all(sum(A[p][i] * G[p][u] * B[j][p] for p in range(6)) == int(j == i + u)
               for i in range(4) for u in range(3) for j in range(6))


def test_the_transforms_compute_a_correlation_exactly():
    assert is_correlation(evaluation(4), evaluation(3), inverse(evaluation(6)))


def test_the_identity_fails_with_a_wrong_point_or_without_the_transpose():
    moved = (0.0, 1.0, -1.0, 0.5, 2.0)
    assert is_correlation(evaluation(4, moved), evaluation(3, moved), inverse(evaluation(6, moved)))  # points are free
    assert not is_correlation(evaluation(4), evaluation(3), inverse(evaluation(6, moved)))            # all the same
    assert not is_correlation(evaluation(4, moved), evaluation(3), inverse(evaluation(6)))
    B = inverse(evaluation(6))
    assert not is_correlation(evaluation(4), evaluation(3), [list(row) for row in zip(*B, strict=True)])


def test_the_matrices_in_use_are_these():
    A, G, B = (np.array(m, float) for m in (evaluation(4), evaluation(3), inverse(evaluation(6))))
    used = transforms(np, np.dtype(np.float64))
    np.testing.assert_array_equal(used.AT, A.T)
    np.testing.assert_array_equal(used.GG, np.kron(G, G))
    np.testing.assert_allclose(used.BT, B.T, rtol=1e-14, atol=1e-15)
    doubling = np.repeat(np.eye(4), [1, 2, 2, 1], axis=0)                   # rows 0 1 1 2 2 3
    np.testing.assert_allclose(transforms(np, np.dtype(np.float64), True).BT, B.T @ doubling, rtol=1e-14, atol=1e-15)
    assert used.AT[:, nn.winograd.POINT_ONE].tolist() == [1, 1, 1, 1]       # what carries the bias


# ---- against the loops

def draw(rng, H, W, N, C, K, upsample, dtype=np.float64):
    size = 2 if upsample else 1
    x, w, b = rng.standard_normal((H, W, N, C)), rng.standard_normal((3, 3, C, K)), rng.standard_normal((N, K))
    return tuple(a.astype(dtype) for a in (x, w, b, rng.standard_normal((size * H, size * W, N, K))))


def run(x, w, b, dy, upsample):
    y, cache = conv_forward(x, w, b, upsample=upsample)
    assert cache[0] == "winograd"
    return y, *conv_backward(dy, cache)


def expected(x, w, b, dy, upsample):
    big = reference.upsample(x) if upsample else x
    dbig, dw, db = reference.conv_backward(dy, big, w)
    return reference.conv(big, w, b), reference.upsample_backward(dbig) if upsample else dbig, dw, db


def errors(*case):
    return [error(a, b) for a, b in zip(run(*case), expected(*case), strict=True)]


@pytest.fixture
def always(monkeypatch):
    """Winograd for any number of channels."""
    monkeypatch.setattr(nn.conv, "WINOGRAD_MIN_CHANNELS", 1)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("H", range(1, 10))
def test_every_size(H, upsample, rng, always):
    for W in range(1, 10):
        assert max(errors(*draw(rng, H, W, 1, 3, 2, upsample), upsample)) < 1e-12


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("N, C, K", [(1, 1, 1), (2, 1, 5), (3, 4, 1), (2, 9, 12)])
def test_channels_and_batches(N, C, K, upsample, rng, always):
    assert max(errors(*draw(rng, 6, 5, N, C, K, upsample), upsample)) < 1e-12


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("H", [1, 3, 7, 8, 13])
def test_blocks_change_nothing(H, upsample, rng, always, monkeypatch):
    x, w, b, dy = draw(rng, H, 6, 2, 3, 2, upsample)
    assert len(_Grid(x, upsample).blocks(2)) == 1
    whole = run(x, w, b, dy, upsample)
    monkeypatch.setattr(nn.winograd, "WINOGRAD_BLOCK_BYTES", 1)
    grid = _Grid(x, upsample)
    assert len(grid.blocks(2)) == grid.Th == -(-dy.shape[0] // 4)
    for a, c in zip(run(x, w, b, dy, upsample), whole, strict=True):
        assert error(a, c) < 1e-13
    assert max(errors(x, w, b, dy, upsample)) < 1e-12


def test_blocks_of_several_tile_rows(rng, always, monkeypatch):
    x, w, b, dy = draw(rng, 21, 5, 1, 3, 2, False)
    monkeypatch.setattr(nn.winograd, "WINOGRAD_BLOCK_BYTES", 2 * 36 * 2 * 3 * 8)
    assert [s.stop - s.start for s in _Grid(x, False).blocks(2)] == [2, 2, 2]
    assert max(errors(x, w, b, dy, False)) < 1e-12


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("C, K", [(8, 8), (32, 64), (64, 16)])
def test_float32_is_within_1e_5_of_the_largest_value(C, K, upsample, rng):
    case = draw(rng, 8, 8, 2, C, K, upsample)
    double = run(*case, upsample)
    single = run(*(a.astype(np.float32) for a in case), upsample)
    assert all(a.dtype == np.float32 for a in single)
    assert max(error(a, b) for a, b in zip(single, double, strict=True)) <= 1e-5
    if C == K:
        assert max(error(a, b) for a, b in zip(single, expected(*case, upsample), strict=True)) <= 1e-5


def test_non_contiguous_maps(rng, always):
    x, w, b, dy = draw(rng, 6, 7, 2, 3, 4, False)
    wide, dwide = np.repeat(x, 2, axis=3), np.repeat(dy, 2, axis=3)
    actual = run(wide[..., ::2], w, b, dwide[..., ::2], False)
    for a, c in zip(actual, expected(x, w, b, dy, False), strict=True):
        assert error(a, c) < 1e-12


# ---- the pieces

def test_filter_transform_and_its_backward_are_transposes(rng):
    w, dU = rng.standard_normal((3, 3, 4, 5)), rng.standard_normal((36, 4, 5))
    left, right = (filter_transform(w) * dU).sum(), (w * filter_transform_backward(dU)).sum()
    assert abs(left - right) < 1e-12 * np.abs(dU).sum()


@pytest.mark.parametrize("upsample", [False, True])
def test_overlap_add_is_the_transpose_of_windows(upsample, rng):
    BT, step, count = transforms(np, np.dtype(np.float64), upsample).BT, (2 if upsample else 4), 3
    reach = BT.shape[1]
    x = rng.standard_normal((step * count + reach - step, 5))
    tiles, out = rng.standard_normal((count, 6, 5)), np.full(x.shape, np.nan)
    _overlap_add(out, 0, BT, tiles, step)
    left, right = ((BT @ _windows(x, 0, count, reach, step)) * tiles).sum(), (x * out).sum()
    assert abs(left - right) < 1e-12 * np.abs(tiles).sum()


# ---- what must break it

def tampered(change):
    """`transforms` with one matrix changed."""
    def changed(xp, dtype, upsample=False):
        matrices = transforms(xp, dtype, upsample)
        return matrices._replace(**change(matrices))
    return changed


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("change", [
    pytest.param(lambda m: {"AT": np.array([[p**e for p in (0, 1, -1, 0.5, 2)] + [float(e == 3)] for e in range(4)])},
                 id="wrong point"),
    pytest.param(lambda m: {"BT": m.BT[::-1].copy()}, id="wrong order of points"),
    pytest.param(lambda m: {"GG": np.abs(m.GG)}, id="lost sign"),
])
def test_wrong_matrices_are_noticed(change, upsample, rng, always, monkeypatch):
    case = draw(rng, 6, 7, 1, 3, 2, upsample)
    monkeypatch.setattr(nn.winograd, "transforms", tampered(change))
    assert min(errors(*case, upsample)[:3]) > 1e-2


def test_B_in_place_of_its_transpose_is_noticed(rng, always, monkeypatch):
    case = draw(rng, 6, 7, 1, 3, 2, False)
    monkeypatch.setattr(nn.winograd, "transforms", tampered(lambda m: {"BT": m.BT.T.copy()}))
    assert min(errors(*case, False)[:3]) > 1e-2


@pytest.mark.parametrize("upsample", [False, True])
def test_a_missing_overlap_add_is_noticed(upsample, rng, always, monkeypatch):
    def without_overlap(out, axis, BT, tiles, step):
        BT = BT.copy()
        BT[:, step:] = 0
        _overlap_add(out, axis, BT, tiles, step)
    case = draw(rng, 9, 7, 1, 3, 2, upsample)
    monkeypatch.setattr(nn.winograd, "_overlap_add", without_overlap)
    y, dx, dw, _ = errors(*case, upsample)
    assert dx > 1e-2 and y < 1e-12 and dw < 1e-12


def test_a_bias_at_another_point_is_noticed(rng, always, monkeypatch):
    case = draw(rng, 6, 7, 1, 3, 2, False)
    monkeypatch.setattr(nn.winograd, "POINT_ONE", 2)
    assert errors(*case, False)[0] > 1e-2


def test_upsampling_after_the_convolution_is_noticed(rng, always):
    x, w, b, dy = draw(rng, 4, 5, 1, 3, 2, True)
    y, _ = winograd_forward(x, filter_transform(w), b, upsample=True)
    assert error(reference.upsample(reference.conv(x, w, b)), y) > 1e-2
