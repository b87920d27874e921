"""Two-dimensional convolution as matrix products, because clients have different kernels.

Under `vmap` over per-client kernels a convolution becomes a grouped convolution, which is slow on CPU and GPU alike,
and inside a loop XLA:CPU does not use its fast kernels for it. A matrix product becomes a batched matrix product.

* "patches" (im2col): each output position reads a patch of k × k positions, copied into one row of a matrix.
* "toeplitz", for few channels, where copying costs more than multiplying: outputs are computed in tiles of t × t positions,
  t = 2. A tile reads t+k−1 input rows and columns; the kernel is expanded into a banded (block-Toeplitz) matrix from this
  patch to the t × t outputs. Each value is copied (1 + (k−1)/t)² times instead of k², and the matrix product is wider, at
  the price of multiplications with zeros.
* "winograd", for many channels, where multiplying dominates: see `winograd`.

Inputs and outputs are NHWC. Within the toeplitz form the input is cut into cells of t × t positions, so that a patch is a
few whole cells, and the examples of the batch are the last axis: [cell, row of cells, column of cells, B]. So gathering
patches copies long contiguous runs, and elementwise operations are vectorised over the batch however few channels there
are.
"""

from math import ceil
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_qp.models.pooling import max_of_windows, max_pool
from fedjax_qp.models.winograd import TILES, join_tiles, winograd_tiles

Form = Literal["auto", "lax", "patches", "toeplitz", "winograd"]
Padding = Literal["SAME", "VALID"] | int

# Inputs with no more channels than this are taken for images, which come straight from the data.
IMAGE_CHANNELS = 4
# With more channels multiplying dominates.
TOEPLITZ_CHANNELS = 16
# Side of an output tile: just a pooling window. Tiles of 4 copy less, but multiply with more zeros: LeNet's step is slower.
TILE = 2


def convolution(
    inputs: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C O"],
    *,
    stride: int = 1,
    padding: Padding = "VALID",
    form: Form = "auto",
) -> Float[Array, "B h w O"]:
    """Cross-correlation, as `jax.lax.conv_general_dilated` computes it for NHWC and HWIO.

    Args:
      inputs: [B, H, W, C].
      kernel: [kh, kw, C, O].
      stride: the same for rows and columns.
      padding: "SAME", "VALID", or the number of zeros on each side (PyTorch's `padding`).
      form: see the module docstring; all are equal up to rounding. A layer that a form cannot compute, for its stride or
        its size, is computed by patches.

    Returns:
      [B, h, w, O].
    """
    if resolve_form(form, kernel.shape) == "lax":
        around = [(padding, padding)] * 2 if isinstance(padding, int) else padding
        return jax.lax.conv_general_dilated(
            inputs, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    inputs, (height, width) = _pad(inputs, kernel.shape, stride, padding)
    form = _possible(form, kernel.shape, (height, width), stride)
    if form == "winograd":
        return join_tiles(winograd_tiles(inputs, kernel, (height, width)))[:, :height, :width]
    if form == "patches":
        return _by_patches(inputs, kernel, stride, (height, width))
    tiles = ceil(height / TILE), ceil(width / TILE)
    outputs = _banded_matrix(kernel) @ _gather_patches(inputs, kernel.shape, tiles)
    return _from_tiles(outputs, TILE, tiles)[:, :height, :width]


def convolution_relu_pool(
    inputs: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C O"],
    bias: Float[Array, "O"],
    *,
    padding: Padding = "VALID",
    form: Form = "auto",
) -> Float[Array, "B h w O"]:
    """Convolution with stride 1, bias, ReLU and 2 × 2 max-pooling, without ever forming the unpooled image.

    In forms with tiles the outputs are ordered by their position in the window first: pooling is a maximum of four parts.
    Bias and ReLU are monotone and may come after it: the same values and gradients, from a quarter of the work.

    Args:
      inputs: [B, H, W, C].
      kernel: [kh, kw, C, O].
      bias: [O].
      padding: as in `convolution`.
      form: as in `convolution`.

    Returns:
      [B, h, w, O], half the size of the convolution's output, rounded down.
    """
    inputs, (height, width) = _pad(inputs, kernel.shape, 1, padding)
    pooled = height // 2, width // 2
    form = _possible(form, kernel.shape, (2 * pooled[0], 2 * pooled[1]))
    if form == "winograd":
        tiles = winograd_tiles(inputs, kernel, (2 * pooled[0], 2 * pooled[1]))
        outputs = jax.nn.relu(join_tiles(_pooled_tiles(tiles)) + bias)
    elif form == "toeplitz":
        outputs = _toeplitz_relu_pool(inputs, kernel, bias, pooled)
    else:
        outputs = jax.nn.relu(max_pool(convolution(inputs, kernel, form=form)) + bias)
    return outputs[:, : pooled[0], : pooled[1]]


def _pooled_tiles(tiles: Float[Array, "t t B rows columns O"]) -> Float[Array, "u u B rows columns O"]:
    half = len(tiles) // 2
    windows = tiles.reshape(half, 2, half, 2, *tiles.shape[2:]).transpose(1, 3, 0, 2, 4, 5, 6, 7)
    return max_of_windows(windows.reshape(4, half, half, *tiles.shape[2:]))


def _toeplitz_relu_pool(inputs: Array, kernel: Array, bias: Array, pooled: tuple[int, int]) -> Float[Array, "B h w O"]:
    """A tile is a pooling window, and its positions come first in the product."""
    outputs = _banded_matrix(kernel) @ _gather_patches(inputs, kernel.shape, pooled)
    outputs = max_of_windows(outputs.reshape(TILE * TILE, len(bias), -1))
    return _batch_last_gradient(_from_tiles(jax.nn.relu(outputs + bias[:, None]), 1, pooled))


def resolve_form(form: Form, kernel: tuple[int, ...]) -> Form:
    """Returns the fastest form on the present kind of device for `auto`; see `benchmarks/convolution.py`.

    Args:
      kernel: shape [kh, kw, C, O].
    """
    if form != "auto":
        return form
    if jax.default_backend() != "cpu":
        return "patches"  # unmeasured on GPU and TPU; avoids the grouped convolution and wastes no multiplications
    return "toeplitz" if kernel[2] <= TOEPLITZ_CHANNELS else "winograd"


def _possible(form: Form, kernel: tuple[int, ...], outputs: tuple[int, int], stride: int = 1) -> Form:
    """The form that computes a layer."""
    form = resolve_form(form, kernel)
    if form == "toeplitz":
        possible = max(kernel[:2]) > 1 and min(outputs) >= TILE
    elif form == "winograd":
        possible = kernel[0] == kernel[1] and kernel[0] in TILES and min(outputs) >= TILES[kernel[0]]
    else:
        return form
    return form if possible and stride == 1 else "patches"


def _pad(inputs: Array, kernel: tuple[int, ...], stride: int, padding: Padding) -> tuple[Array, tuple[int, int]]:
    """Returns the padded inputs and the size of the convolution's output."""
    pads = [_sides(size, k, stride, padding) for size, k in zip(inputs.shape[1:3], kernel[:2], strict=True)]
    sizes = [size + sum(pad) for size, pad in zip(inputs.shape[1:3], pads, strict=True)]
    height, width = ((size - k) // stride + 1 for size, k in zip(sizes, kernel[:2], strict=True))
    return jnp.pad(inputs, [(0, 0), *pads, (0, 0)]), (height, width)


def _sides(size: int, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    if isinstance(padding, int):
        return padding, padding
    total = max((ceil(size / stride) - 1) * stride + kernel - size, 0) if padding == "SAME" else 0
    return total // 2, total - total // 2


def _by_patches(
    inputs: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C O"], stride: int, size: tuple[int, int]
) -> Float[Array, "B h w O"]:
    high, wide = (stride * (outputs - 1) + 1 for outputs in size)
    offsets = [(y, x) for y in range(kernel.shape[0]) for x in range(kernel.shape[1])]
    patches = [inputs[:, y : y + high : stride, x : x + wide : stride] for y, x in offsets]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[3])


def _gather_patches(
    inputs: Float[Array, "B H W C"], kernel: tuple[int, ...], tiles: tuple[int, int]
) -> Float[Array, "patch tiles_and_B"]:
    """Copies what each output tile reads; a patch is ordered (cell, row in cell, column in cell, channel)."""
    batch, channels = inputs.shape[0], inputs.shape[3]
    reach = [ceil((TILE - 1 + k) / TILE) for k in kernel[:2]]  # cells in a patch
    counts = [count + more - 1 for count, more in zip(tiles, reach, strict=True)]
    inputs = inputs[:, : counts[0] * TILE, : counts[1] * TILE]
    short = [(0, count * TILE - size) for count, size in zip(counts, inputs.shape[1:3], strict=True)]
    if channels <= IMAGE_CHANNELS:
        inputs = _transposed_by_product(inputs)
    cells = jnp.pad(inputs, [(0, 0), *short, (0, 0)]).reshape(batch, counts[0], TILE, counts[1], TILE, channels)
    cells = cells.transpose(2, 4, 5, 1, 3, 0).reshape(TILE * TILE * channels, *counts, batch)
    parts = [cells[:, y : y + tiles[0], x : x + tiles[1]] for y in range(reach[0]) for x in range(reach[1])]
    return jnp.concatenate(parts).reshape(len(parts) * len(cells), -1)


def _transposed_by_product(images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the images unchanged, but so that XLA:CPU lays them out with the batch last, and only once.

    XLA fuses a plain transposition into each reader, where it runs one element at a time, together with whatever made
    the images (the look-up in the data set). It never fuses a matrix product: that saves a tenth to a quarter of a step.
    Exact for finite values; an infinite or undefined one would spread over the batch.
    """
    if jax.default_backend() != "cpu":
        return images
    batch = images.shape[0]
    transposed = jnp.matmul(images.reshape(batch, -1).T, jnp.eye(batch, dtype=images.dtype))
    return transposed.T.reshape(images.shape)


@jax.custom_vjp
def _batch_last_gradient(outputs: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the outputs unchanged; their gradient is transposed once, and not in each of its readers."""
    return outputs


_batch_last_gradient.defvjp(
    lambda outputs: (outputs, None), lambda residuals, gradient: (_transposed_by_product(gradient),)
)


def _from_tiles(outputs: Float[Array, "outputs tiles_and_B"], tile: int, tiles: tuple[int, int]) -> Array:
    """Puts tiles ordered (row, column, channel) back into images [B, H, W, O]."""
    channels, (rows, columns) = outputs.shape[0] // tile**2, tiles
    outputs = outputs.reshape(tile, tile, channels, rows, columns, -1).transpose(5, 3, 0, 4, 1, 2)
    return outputs.reshape(-1, rows * tile, columns * tile, channels)


def _banded_matrix(kernel: Float[Array, "kh kw C O"]) -> Float[Array, "outputs patch"]:
    """Expands a kernel into the matrix from a patch (`_gather_patches`) to a tile ordered (row, column, channel)."""
    height, width, channels, outputs = kernel.shape
    reach = [ceil((TILE - 1 + k) / TILE) for k in (height, width)]
    rows, columns = (cells * TILE for cells in reach)
    kernel = kernel.transpose(3, 0, 1, 2)
    shifted = [
        jnp.pad(kernel, ((0, 0), (y, rows - height - y), (x, columns - width - x), (0, 0)))
        for y in range(TILE)
        for x in range(TILE)
    ]
    matrix = jnp.stack(shifted).reshape(TILE * TILE * outputs, reach[0], TILE, reach[1], TILE, channels)
    return matrix.swapaxes(2, 3).reshape(TILE * TILE * outputs, rows * columns * channels)
