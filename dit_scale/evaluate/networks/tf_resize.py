"""TensorFlow 1's bilinear resize, the first layer of Inception's graph.

ResizeBilinear with align_corners=False and half_pixel_centers=False: output pixel i reads the input at
i * in/out, without a shift by half a pixel and without antialias. All arithmetic is fp32, as in TensorFlow's
kernel.

Shapes: N images, C channels, H W input pixels, h w output pixels.
"""

import torch
from torch import Tensor


def resize_bilinear_tf1(x_NCHW: Tensor, height: int, width: int) -> Tensor:
    """Resize fp32 images => (N, C, h, w)."""
    x_NCHw = _resize_last(x_NCHW, width)  # TensorFlow interpolates along the row first
    return _resize_last(x_NCHw.transpose(2, 3), height).transpose(2, 3).contiguous()


def _resize_last(x: Tensor, size: int) -> Tensor:
    """Interpolate along the last dimension: x[low] + (x[high] - x[low]) * fraction."""
    num_pixels = x.shape[-1]
    scale = torch.tensor(num_pixels, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
    source = torch.arange(size, dtype=torch.float32) * scale
    low = source.floor().long()
    high = (low + 1).clamp(max=num_pixels - 1)
    fraction = (source - low).to(x.device)
    x_low, x_high = (x.index_select(-1, index.to(x.device)) for index in (low, high))
    return x_low + (x_high - x_low) * fraction
