"""NormalFloat by its definition: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E."""

import torch

CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Each number as the nearest code times the largest magnitude of its block, in the weight's dtype."""
    codes = torch.tensor(CODES)
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = codes[torch.bucketize(blocks / scales, (codes[1:] + codes[:-1]) / 2)] * scales
    return nearest.flatten()[: len(flat)].view(weight.shape).to(weight.dtype)
