"""3x3 convolution, stride 1, by Winograd's F(4x4, 3x3): 36 products per 4x4 output tile instead of 144.

One dimension first. Multiplying two polynomials, g with 3 coefficients and v with 4, gives one with 6; it is fixed
by its values at 6 points (one of them "at infinity", the leading coefficient), and values multiply pointwise:

    g * v = E6^-1 [ (E3 g) . (E4 v) ],        E_k = evaluation of k coefficients at the 6 points, (6, k)

A convolution layer wants the transposed map: v -> g*v is linear with some matrix M(g), and y = M(g)^T d is the
correlation y[i] = sum_u g[u] d[i+u] of 6 inputs into 4 outputs. Transposing the right-hand side in v gives

    y = A^T [ (G g) . (B^T d) ],              A^T = E4^T (4, 6),  G = E3 (6, 3),  B^T = E6^-T (6, 6)

In two dimensions each matrix acts on rows and on columns. Per tile and channel pair there are 6x6 products, and the
sum over input channels turns them into 36 matrix products, which is where the time goes:

    V = B^T d B  (36, tiles*N, C)      U = G g G^T  (36, C, K)      M = V @ U  (36, tiles*N, K)      y = A^T M A

Each arrow is linear, so backward runs the same chain transposed: dM = A dy A^T, dU = V^T dM, dV = dM U^T,
dx = B dV B^T summed where tiles overlap, dw = G^T dU G.

The points are free. Exactness does not depend on them, rounding does: of the usual choices 0, +-1, 1/2, -2 and
infinity had the smallest largest error in float32 (2e-6 of the largest value, a third of that with 0, +-1, +-2). The
point 1 is wanted for the bias: its row of A is all ones, so a bias added to that one of the 36 products appears at
every output.

Nearest-neighbour upsampling in front (`upsample=True`) is linear too: a 6-row input tile of the doubled image holds
only 4 different rows of the small one, so B^T (6, 6) becomes B^T D (6, 4) with the duplication matrix D, tiles step
by 2 instead of 4, and the doubled image never exists.

Layout: feature maps are (H, W, N, C). Rows of N*C numbers are long, a transform along H or W is one small constant
matrix times a strided view, and nothing is rearranged in between. Any H and W: the tile grid is padded and cropped.
The transforms are 36/16 as large as the maps, so work goes by blocks of tile rows whose transforms stay in the cache.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nn.backend import array_module, row_blocks

TILE = 4
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
POINT_ONE = POINTS.index(1.0)
WINOGRAD_BLOCK_BYTES = 1024 * 1024
"""Transformed input of one block of tile rows; measured best between 0.6 and 1.5 MB, about a core's L2 cache."""


class Transforms(NamedTuple):
    """The constant matrices, in the array library and dtype of the feature maps."""

    BT: object    # (6, 6), or (6, 4) behind a nearest upsampling
    AT: object    # (4, 6)
    GG: object    # (36, 9): G on both axes of a 3x3 filter at once


def _evaluation(coefficients):
    """E_k (6, k): values of a polynomial at POINTS, then its leading coefficient."""
    finite = np.vander(POINTS, coefficients, increasing=True)
    return np.vstack([finite, np.eye(coefficients)[-1]])


@lru_cache(maxsize=16)
def transforms(xp, dtype, upsample=False):
    """Winograd's matrices for one array library and dtype."""
    AT, G, BT = _evaluation(4).T, _evaluation(3), np.linalg.inv(_evaluation(6)).T
    if upsample:
        BT = BT @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return Transforms(*(xp.asarray(np.ascontiguousarray(m, dtype=dtype)) for m in (BT, AT, np.kron(G, G))))


def filter_transform(w):
    """U = G g G^T for every channel pair: w (3, 3, C, K) -> (36, C, K)."""
    C, K = w.shape[2:]
    GG = transforms(array_module(w), w.dtype).GG
    return (GG @ w.reshape(9, C * K)).reshape(36, C, K)


def filter_transform_backward(dU):
    """dw = G^T dU G: (36, C, K) -> (3, 3, C, K)."""
    C, K = dU.shape[1:]
    GG = transforms(array_module(dU), dU.dtype).GG
    return (GG.T @ dU.reshape(36, C * K)).reshape(3, 3, C, K)


def winograd_forward(x, U, b=None, *, upsample=False):
    """y = 3x3 convolution ("same" zero padding) of x, or of x doubled in size; returns y and what backward needs.

    x (H, W, N, C); U (36, C, K) = filter_transform(w); b (K,), (N, K) or None; y (H, W, N, K), or (2H, 2W, N, K).
    """
    xp, K = array_module(x, U), U.shape[2]
    AT = transforms(xp, x.dtype).AT
    grid = _Grid(x, upsample)
    y = xp.empty((grid.H_out, grid.W_out, grid.N, K), x.dtype)
    for tiles in grid.blocks(K):
        M = _input_transform(x, grid, tiles).reshape(36, -1, grid.C) @ U
        if b is not None:
            M[7 * POINT_ONE].reshape(-1, grid.N, K)[...] += b
        rows = slice(TILE * tiles.start, min(TILE * tiles.stop, grid.H_out))
        block = _output_transform(M.reshape(6, 6, -1, grid.Tw, grid.N * K), AT)
        y[rows] = block.reshape(-1, TILE * grid.Tw, grid.N, K)[:rows.stop - rows.start, :grid.W_out]
    return y, (x, U, upsample)


def winograd_backward(dy, cache, *, U_transposed=None, params=True):
    """(dx, dU) of `winograd_forward`; dU is None without `params` (dw = filter_transform_backward(dU)).

    U_transposed (36, K, C), contiguous, is worth keeping between calls: a product with it runs up to twice as fast.
    """
    x, U, upsample = cache
    xp, K = array_module(dy, U), U.shape[2]
    AT = transforms(xp, dy.dtype).AT
    grid = _Grid(x, upsample)
    UT = U.transpose(0, 2, 1) if U_transposed is None else U_transposed
    dU = xp.zeros_like(U) if params else None
    dx = xp.empty(x.shape, dy.dtype)
    for tiles in grid.blocks(K):
        rows = slice(TILE * tiles.start, min(TILE * tiles.stop, grid.H_out))
        dM = _output_transform_backward(dy[rows], AT, grid, tiles).reshape(36, -1, K)
        if params:
            V = _input_transform(x, grid, tiles).reshape(36, -1, grid.C)
            dU += V.transpose(0, 2, 1) @ dM
        _input_transform_backward((dM @ UT).reshape(6, 6, -1, grid.Tw, grid.N * grid.C), dx, grid, tiles)
    return dx, dU


class _Grid:
    """How the map x (H, W, N, C) is cut into Th x Tw tiles of `reach` rows that start every `step` rows.

    Row 0 of the first tile is the border row -1 of x. Work goes by blocks of tile rows whose transforms fit in the
    cache together; a device takes all at once.
    """

    def __init__(self, x, upsample):
        self.xp = array_module(x)
        self.H, self.W, self.N, self.C = x.shape
        self.BT = transforms(self.xp, x.dtype, upsample).BT
        size = 2 if upsample else 1
        self.reach, self.step = self.BT.shape[1], TILE // size
        self.H_out, self.W_out = size * self.H, size * self.W
        self.Th, self.Tw = -(-self.H_out // TILE), -(-self.W_out // TILE)
        self.width = self.step * self.Tw + self.reach - self.step

    def blocks(self, K):
        """Slices of tile rows."""
        tile_row_bytes = 36 * self.Tw * self.N * max(self.C, K) * self.BT.itemsize
        return row_blocks(self.Th, tile_row_bytes, self.xp, block_bytes=WINOGRAD_BLOCK_BYTES)

    def rows(self, tiles):
        """Rows of x that a block of tile rows reads, and how many border rows stand above the first."""
        first, last = self.step * tiles.start - 1, self.step * (tiles.stop - 1) + self.reach - 1
        return slice(max(first, 0), min(last, self.H)), max(-first, 0)


# ---- B^T d B and its transpose: tiles of `reach` rows that step by `step` and overlap

def _input_transform(x, grid, tiles):
    """V (6, 6, tiles, Tw, N*C) = B^T d B of every tile d in a block of tile rows."""
    xp, BT, count, row = grid.xp, grid.BT, tiles.stop - tiles.start, grid.N * grid.C
    read, above = grid.rows(tiles)
    height = grid.step * count + grid.reach - grid.step
    padded = _place(x[read].reshape(-1, grid.W, row), above, 1, height, grid.width)
    rows = xp.empty((6, count, grid.width * row), x.dtype)
    windows = _windows(padded.reshape(height, -1), 0, count, grid.reach, grid.step)
    xp.matmul(BT, windows, out=rows.transpose(1, 0, 2))
    V = xp.empty((6, 6, count, grid.Tw, row), x.dtype)
    windows = _windows(rows.reshape(6, count, grid.width, row), 2, grid.Tw, grid.reach, grid.step)
    xp.matmul(BT, windows, out=V.transpose(0, 2, 3, 1, 4))
    return V


def _input_transform_backward(dV, dx, grid, tiles):
    """Add a block's B dV B^T to the rows of dx that it read; blocks come in order and overlap in reach - step rows."""
    xp, BT, (count, row) = grid.xp, grid.BT, (dV.shape[2], dV.shape[4])
    rows = xp.empty((6, count, grid.width, row), dV.dtype)
    _overlap_add(rows, 2, BT, dV.transpose(0, 2, 3, 1, 4), grid.step)
    dpadded = xp.empty((grid.step * count + grid.reach - grid.step, grid.width * row), dV.dtype)
    _overlap_add(dpadded, 0, BT, rows.reshape(6, count, -1).transpose(1, 0, 2), grid.step)
    write, above = grid.rows(tiles)
    block = dpadded.reshape(-1, grid.width, grid.N, grid.C)[above:above + write.stop - write.start, 1:grid.W + 1]
    shared = grid.reach - grid.step - above if tiles.start else 0
    dx[write][:shared] += block[:shared]
    dx[write][shared:] = block[shared:]


def _place(x, top, left, H, W):
    """A new (H, W, row) array that holds x (h, w, row) from (top, left) on and zeros elsewhere."""
    h, w, row = x.shape
    placed = array_module(x).empty((H, W, row), x.dtype)
    placed[:top] = 0
    placed[top + h:] = 0
    placed[top:top + h, :left] = 0
    placed[top:top + h, left + w:] = 0
    placed[top:top + h, left:left + w] = x
    return placed


def _windows(x, axis, count, reach, step):
    """Overlapping tiles along `axis` of an array as a view: axis length -> (count, reach)."""
    shape = x.shape[:axis] + (count, reach) + x.shape[axis + 1:]
    strides = x.strides[:axis] + (step * x.strides[axis], x.strides[axis]) + x.strides[axis + 1:]
    return array_module(x).lib.stride_tricks.as_strided(x, shape, strides)


def _overlap_add(out, axis, BT, tiles, step):
    """out[step*q + r] = sum over tiles q of (B tiles[q])[r] along `axis`: the transpose of `_windows`, times B.

    The first `step` rows of the tiles do not meet each other and are written in place; the rest reach into the next
    tile and are added to it.
    """
    xp, count, reach = array_module(out), tiles.shape[axis], BT.shape[1]
    before = (slice(None),) * axis
    main = out[before + (slice(step * count),)].reshape(out.shape[:axis] + (count, step) + out.shape[axis + 1:])
    edge = xp.matmul(BT.T[step:], tiles)
    xp.matmul(BT.T[:step], tiles, out=main)
    main[before + (slice(1, None), slice(reach - step))] += edge[before + (slice(-1),)]
    out[before + (slice(step * count, None),)] = edge[before + (-1,)]


# ---- A^T M A and its transpose: 6x6 products into 4x4 outputs, tiles side by side

def _output_transform(M, AT):
    """y (Th, 4, Tw, 4, row) = A^T M A of every tile."""
    xp = array_module(M)
    Th, Tw, row = M.shape[2:]
    rows = (AT @ M.reshape(6, -1)).reshape(TILE, 6, Th, Tw, row)
    y = xp.empty((Th, TILE, Tw, TILE, row), M.dtype)
    xp.matmul(AT, rows.transpose(0, 2, 3, 1, 4), out=y.transpose(1, 0, 2, 3, 4))
    return y


def _output_transform_backward(dy, AT, grid, tiles):
    """dM (6, 6, tiles, Tw, N*K) = A dy A^T of a block of tile rows; dy holds the rows of them that exist."""
    xp, count, row = grid.xp, tiles.stop - tiles.start, dy.shape[2] * dy.shape[3]
    dy = dy.reshape(dy.shape[:2] + (row,))
    if dy.shape[:2] != (TILE * count, TILE * grid.Tw):
        dy = _place(dy, 0, 0, TILE * count, TILE * grid.Tw)
    dy = dy.reshape(count, TILE, grid.Tw, TILE, row)
    rows = xp.empty((TILE, 6, count, grid.Tw, row), dy.dtype)
    xp.matmul(AT.T, dy.transpose(1, 0, 2, 3, 4), out=rows.transpose(0, 2, 3, 1, 4))
    return AT.T @ rows.reshape(TILE, -1)
