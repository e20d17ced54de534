"""The design space as the paper published it: FID-50K after 400,000 steps, without guidance.

Peebles & Xie, arXiv 2212.09748: Table 4 for the twelve models, Figure 5 for the conditioning designs of
DiT-XL/2. All runs used a global batch of 256 images of 256 pixels.
"""

from dit_scale.evaluate.paper import AT_400K
from dit_scale.models.zoo import Conditioning

STEPS, GLOBAL_BATCH, IMAGE_SIZE = 400_000, 256, 256

FID: dict[tuple[str, Conditioning], float] = {
    **{(name, "adaln_zero"): fid for name, fid in AT_400K.items()},
    ("DiT-XL/2", "in_context"): 35.24,
    ("DiT-XL/2", "cross_attention"): 26.14,
    ("DiT-XL/2", "adaln"): 25.21,
}

CORRELATION = -0.93
"""The correlation that the paper states: of the logarithm of Gflops and FID, over the twelve models."""
