"""The forward convolution: the library's, or on small maps a matrix product over patches.

The library reorders the weights at every call. Where a map has 16 pixels and the weights megabytes
that is most of the time and of the memory: 800 -> 800 channels, 3x3 on 4x4 maps, 32 samples,
2 cores: 27.6 against 21.9 ms in fp32, 10.0 against 3.6 ms in bf16, and 23 MB less scratch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from ffengine.ops import product
from ffengine.ops.optim import ConvGeometry
from ffengine.ops.product_rule import exact
from ffengine.ops.tracing import traced

#: Output pixels a sample up to which patches win; measured library / patches on 2 cores (AVX-512,
#: AMX) at 4, 16 and 64 samples: 2x2 maps 3.2, 3.0, 2.7 (fp32, 400 channels) and 3.5, 3.2, 4.5
#: (bf16); 4x4 maps 1.9, 1.5, 1.3 and 2.7, 2.7, 1.4 (800); 8x8 maps 1.1, 0.9, 0.6 and 1.3, 0.6, 0.9.
PATCH_PIXELS = 16
#: Patches of one product: enough rows for the product's full rate, few enough to stay in cache.
PATCH_ROWS, PATCH_BYTES = 256, 4 << 20


def choose(out_pixels: int, kernel: tuple[int, int], dtype: torch.dtype,
           device: str) -> Literal["library", "patches"]:
    """Which of the two convolves maps of `out_pixels` pixels. Pure; the batch is not asked."""
    if device != "cpu" or dtype is torch.float64 or traced():
        return "library"
    return "patches" if out_pixels <= PATCH_PIXELS and kernel != (1, 1) else "library"


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
             geometry: ConvGeometry) -> torch.Tensor:
    """a (N, O, P, Q), channels_last, of x (N, C, H, W) and weight (O, C, kH, kW) of one dtype."""
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    if geometry.groups > 1 or choose(height * width, geometry.kernel, x.dtype,
                                     x.device.type) == "library":
        with exact(x.device.type):
            return F.conv2d(x, weight, bias, geometry.stride, geometry.padding,
                            groups=geometry.groups)
    return _by_patches(x, weight, bias, geometry, (height, width))


def samples_at_once(pixels: int, length: int, itemsize: int) -> int:
    """Samples whose patches (pixels x length each) exist at one time."""
    return max(PATCH_ROWS // pixels, PATCH_BYTES // (pixels * length * itemsize), 1)


def _by_patches(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                geometry: ConvGeometry, size: tuple[int, int]) -> torch.Tensor:
    n, pixels = x.shape[0], size[0] * size[1]
    out_channels, length = weight.shape[0], weight[0].numel()
    matrix = weight.permute(0, 2, 3, 1).reshape(out_channels, length)
    out = torch.empty(n * pixels, out_channels, dtype=x.dtype, device=x.device)
    step = samples_at_once(pixels, length, x.element_size())
    for start in range(0, n, step):
        rows = out[start * pixels:(start + step) * pixels]
        seen = patches(x[start:start + step], geometry, size).view(-1, length)
        product.linear_into(rows, seen, matrix)
    if bias is not None:
        out += bias
    return out.view(n, *size, out_channels).permute(0, 3, 1, 2)


def patches(x: torch.Tensor, geometry: ConvGeometry, size: tuple[int, int]) -> torch.Tensor:
    """What each output pixel sees: (N, P, Q, kH, kW, C), contiguous."""
    n, c, height, width = x.shape
    pad, stride = geometry.padding, geometry.stride
    padded = x.new_zeros(n, height + 2 * pad, width + 2 * pad, c)
    padded[:, pad:pad + height, pad:pad + width] = x.permute(0, 2, 3, 1)
    rows, columns = padded.stride(1), padded.stride(2)
    windows = padded.as_strided(
        (n, *size, *geometry.kernel, c),
        (padded.stride(0), rows * stride, columns * stride, rows, columns, 1))
    return windows.contiguous()
