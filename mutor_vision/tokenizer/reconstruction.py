"""How good a tokenizer's reconstructions are: PSNR, SSIM, L1, codebook usage, and grids of examples.

Legend: B batch, H x W pixels, V codebook size. Scores are computed on uint8 images, as they would be saved.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from mutor_vision.data.images import grid, to_float, to_uint8
from mutor_vision.runtime import Runtime
from mutor_vision.tokenizer.model import VQTokenizer
from mutor_vision.tokenizer.quantizer import count_codes, usage


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) twice -> (B,) float64 peak signal-to-noise ratio in dB; 100 where they are equal."""
    error = ((images.double() - others.double()) / 255).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) twice -> (B,) float64 structural similarity, 1 = equal: Gaussian window of 11 pixels and
    sigma 1.5, K1 0.01, K2 0.03, no padding, mean over channels (Wang et al. 2004). H and W must be at least 11."""
    distance = torch.arange(-5, 6, dtype=torch.float64, device=images.device)
    window = torch.exp(-(distance**2) / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 1, 11)

    def blur(x: Tensor) -> Tensor:
        channels = rearrange(x, "b c h w -> (b c) 1 h w")
        return F.conv2d(F.conv2d(channels, window), window.transpose(2, 3))

    x, y = images.double() / 255, others.double() / 255
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return rearrange(luminance * structure, "(b c) 1 h w -> b (c h w)", b=len(images)).mean(dim=1)


@torch.no_grad()
def reconstruct(tokenizer: VQTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, H, W) -> (reconstructions as uint8, codes (B, h, w)) on the tokenizer's device, in float32."""
    codes = tokenizer.encode(to_float(images.to(next(tokenizer.parameters()).device)))
    return to_uint8(tokenizer.decode(codes)), codes


@torch.no_grad()
def score_reconstructions(tokenizer: VQTokenizer, batches: Iterable[Tensor], runtime: Runtime) -> dict[str, float]:
    """uint8 batches (..., 3, H, W) of this rank -> means over the images of all ranks: 'psnr' (dB),
    'ssim', 'l1' (of 0..255), and 'usage' (share of V that occurs), 'perplexity' (of the code frequencies), 'images'."""
    sums = torch.zeros(4, dtype=torch.float64)
    counts = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64, device=runtime.device)
    for images in batches:
        images = images.flatten(0, -4)
        copies, codes = reconstruct(tokenizer, images)
        images = images.to(copies.device)
        l1 = (images.double() - copies.double()).abs().mean(dim=(1, 2, 3))
        scores = [psnr(images, copies), ssim(images, copies), l1, torch.ones_like(l1)]
        sums += torch.stack([score.sum() for score in scores]).cpu()
        counts += count_codes(codes, len(counts))
    sums = runtime.all_reduce(sums.to(runtime.device)).cpu()
    share, perplexity = usage(runtime.all_reduce(counts))
    means = (sums[:3] / sums[3].clamp(min=1)).tolist()
    return {**dict(zip(("psnr", "ssim", "l1"), means, strict=True)), "usage": share, "perplexity": perplexity,
            "images": int(sums[3])}  # fmt: skip


def side_by_side(
    images: Tensor, copies: Tensor, columns: int = 8, names: list[str] | None = None
) -> Image.Image:  # fmt: skip
    """uint8 (B, 3, H, W) twice -> a grid of row pairs: a row of originals above the row of their reconstructions.
    names: B captions, which stand between the two."""
    rows, labels = [], []
    captions: list[str] = []
    for originals, reconstructions in zip(images.cpu().split(columns), copies.cpu().split(columns), strict=True):
        white = originals.new_full((columns - len(originals), *originals.shape[1:]), 255)
        rows += [originals, white, reconstructions, white]
        labels += ["original", "from codes"]
        if names:
            first = len(captions) // 2
            own = names[first : first + columns]
            captions += own + [""] * (2 * columns - len(own))
    return grid(torch.cat(rows), columns, row_labels=labels, captions=captions)
