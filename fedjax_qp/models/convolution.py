"""Two-dimensional convolution as one matrix product, because clients have different kernels.

Under `vmap` over per-client kernels a convolution becomes a grouped convolution, which is slow on CPU and GPU alike,
and inside a loop XLA:CPU does not use its fast kernels for it. A matrix product becomes a batched matrix product.

The outputs are computed in tiles of t × t positions. A tile reads s(t−1)+k input rows and columns; the kernel is
expanded into a banded (block-Toeplitz) matrix from this patch to the t × t outputs:

* t = 1 is im2col ("patches"): no wasted multiplication, but every input value is copied k² times;
* larger t ("toeplitz") copies each value (1 + (k−1)/t)² times only, and makes the matrix product wider, at the price
  of multiplications with zeros. For few channels copying costs more than multiplying.

Inputs and outputs are NHWC. In between, the input is cut into cells of st × st positions, so that a patch is a few
whole cells, and the examples of the batch are the last axis: [cell, row of cells, column of cells, B]. So gathering
patches copies long contiguous runs, and elementwise operations are vectorised over the batch however few channels there
are. Where one layer's pooled tiles are the next layer's cells, as in LeNet, XLA removes the transpositions in between.
"""

from math import ceil
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedjax_qp.models.pooling import max_of_windows, max_pool

Form = Literal["auto", "lax", "patches", "toeplitz"]
Padding = Literal["SAME", "VALID"] | int

# With at most so many channels the inputs are taken for images: larger tiles pay, and they come straight from the data.
IMAGE_CHANNELS = 4
# With more channels the multiplications with zeros cost more than the copies that they save.
TOEPLITZ_CHANNELS = 16


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
      form: see the module docstring; all are equal up to rounding.

    Returns:
      [B, h, w, O].
    """
    form = resolve_form(form)
    if form == "lax":
        around = [(padding, padding)] * 2 if isinstance(padding, int) else padding
        return jax.lax.conv_general_dilated(
            inputs, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    inputs, (height, width) = _pad(inputs, kernel.shape, stride, padding)
    tile = toeplitz_tile(kernel.shape, (height, width)) if form == "toeplitz" and stride == 1 else 1
    tiles = ceil(height / tile), ceil(width / tile)
    outputs = _banded_matrix(kernel, stride, tile) @ _gather_patches(inputs, kernel.shape, stride, tile, tiles)
    return _from_tiles(outputs, tile, tiles)[:, :height, :width]


def convolution_relu_pool(
    inputs: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C O"],
    bias: Float[Array, "O"],
    *,
    padding: Padding = "VALID",
    form: Form = "auto",
) -> Float[Array, "B h w O"]:
    """Convolution with stride 1, bias, ReLU and 2 × 2 max-pooling, without ever forming the unpooled image.

    The outputs of a tile are ordered (position in the window, window, channel): pooling is a maximum of four contiguous
    parts. Bias and ReLU are monotone and may come after it: the same values and gradients, from a quarter of the work.

    Args:
      inputs: [B, H, W, C].
      kernel: [kh, kw, C, O].
      bias: [O].
      padding: as in `convolution`.
      form: as in `convolution`.

    Returns:
      [B, h, w, O], half the size of the convolution's output, rounded down.
    """
    if resolve_form(form) != "toeplitz":
        return jax.nn.relu(max_pool(convolution(inputs, kernel, padding=padding, form=form)) + bias)
    inputs, (height, width) = _pad(inputs, kernel.shape, 1, padding)
    height, width = height // 2, width // 2
    tile = max(2, toeplitz_tile(kernel.shape, (2 * height, 2 * width)))
    half, channels = tile // 2, kernel.shape[3]
    tiles = ceil(height / half), ceil(width / half)
    matrix = _banded_matrix(kernel, 1, tile).reshape(half, 2, half, 2, channels, -1)
    matrix = matrix.transpose(1, 3, 0, 2, 4, 5).reshape(tile * tile * channels, -1)
    outputs = matrix @ _gather_patches(inputs, kernel.shape, 1, tile, tiles)
    outputs = max_of_windows(outputs.reshape(4, half * half * channels, -1))
    outputs = jax.nn.relu(outputs + jnp.tile(bias, half * half)[:, None])
    return _from_tiles(outputs, half, tiles)[:, :height, :width]


def resolve_form(form: Form) -> Form:
    """Returns the fastest form on the present kind of device for `auto`; see `benchmarks/convolution.py`."""
    if form != "auto":
        return form
    # Unmeasured on GPU and TPU: patches avoid the grouped convolution and waste no multiplications.
    return "toeplitz" if jax.default_backend() == "cpu" else "patches"


def toeplitz_tile(kernel: tuple[int, ...], outputs: tuple[int, int]) -> int:
    """Returns the side of an output tile: large where there are few channels, 1 where multiplying dominates.

    Args:
      kernel: shape [kh, kw, C, O].
      outputs: height and width of the output.
    """
    size, channels = max(kernel[:2]), kernel[2]
    if size == 1 or channels > TOEPLITZ_CHANNELS:
        return 1
    tile = 4 if size > 3 and channels <= IMAGE_CHANNELS else 2
    return tile if min(outputs) >= tile else 1


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


def _gather_patches(
    inputs: Float[Array, "B H W C"], kernel: tuple[int, ...], stride: int, tile: int, tiles: tuple[int, int]
) -> Float[Array, "patch tiles_and_B"]:
    """Copies what each output tile reads; a patch is ordered (cell, row in cell, column in cell, channel)."""
    batch, channels, cell = inputs.shape[0], inputs.shape[3], stride * tile
    reach = [ceil((cell - stride + k) / cell) for k in kernel[:2]]  # cells in a patch
    counts = [count + more - 1 for count, more in zip(tiles, reach, strict=True)]
    inputs = inputs[:, : counts[0] * cell, : counts[1] * cell]
    short = [(0, count * cell - size) for count, size in zip(counts, inputs.shape[1:3], strict=True)]
    if channels <= IMAGE_CHANNELS and jax.default_backend() == "cpu":
        inputs = _transposed_by_product(inputs)
    cells = jnp.pad(inputs, [(0, 0), *short, (0, 0)]).reshape(batch, counts[0], cell, counts[1], cell, channels)
    cells = cells.transpose(2, 4, 5, 1, 3, 0).reshape(cell * cell * channels, *counts, batch)
    parts = [cells[:, y : y + tiles[0], x : x + tiles[1]] for y in range(reach[0]) for x in range(reach[1])]
    return jnp.concatenate(parts).reshape(len(parts) * len(cells), -1)


def _transposed_by_product(inputs: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the inputs unchanged, but so that XLA:CPU lays them out with the batch last, and only once.

    XLA fuses a plain transposition into each reader, where it runs one element at a time, together with whatever made
    the images (the look-up in the data set). It never fuses a matrix product: that saves a tenth to a quarter of a step.
    Exact for finite inputs; an infinite or undefined pixel would spread over the batch.
    """
    batch = inputs.shape[0]
    transposed = jnp.matmul(inputs.reshape(batch, -1).T, jnp.eye(batch, dtype=inputs.dtype))
    return transposed.T.reshape(inputs.shape)


def _from_tiles(outputs: Float[Array, "outputs tiles_and_B"], tile: int, tiles: tuple[int, int]) -> Array:
    """Puts tiles ordered (row, column, channel) back into images [B, H, W, O]."""
    channels, (rows, columns) = outputs.shape[0] // tile**2, tiles
    outputs = outputs.reshape(tile, tile, channels, rows, columns, -1).transpose(5, 3, 0, 4, 1, 2)
    return outputs.reshape(-1, rows * tile, columns * tile, channels)


def _banded_matrix(kernel: Float[Array, "kh kw C O"], stride: int, tile: int) -> Float[Array, "outputs patch"]:
    """Expands a kernel into the matrix from a patch (`_gather_patches`) to a tile ordered (row, column, channel)."""
    height, width, channels, outputs = kernel.shape
    cell = stride * tile
    reach = [ceil((cell - stride + k) / cell) for k in (height, width)]
    rows, columns = (cells * cell for cells in reach)
    kernel = kernel.transpose(3, 0, 1, 2)
    shifted = [
        jnp.pad(kernel, ((0, 0), (y, rows - height - y), (x, columns - width - x), (0, 0)))
        for y in range(0, cell, stride)
        for x in range(0, cell, stride)
    ]
    matrix = jnp.stack(shifted).reshape(tile * tile * outputs, reach[0], cell, reach[1], cell, channels)
    return matrix.swapaxes(2, 3).reshape(tile * tile * outputs, rows * columns * channels)
