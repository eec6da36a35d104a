"""Quantizers: latents -> one of V codes each, with a straight-through gradient. What a quantizer is, the one that takes
the nearest of V learned vectors, and statistics of codes.

Legend: B batch, h x w grid, C width of a code, V codebook size, n = B * h * w latents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mutor_vision.config import TokenizerConfig, TokenizerTrainConfig
from mutor_vision.errors import UserError

_CHUNK = 2**24  # distances held at once while searching, 64 MB


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of latents. The three losses are not weighted; all tensors but codes are float32."""

    latents: Tensor  # (B, C, h, w) what the decoder sees; its gradient goes straight through to the encoder
    encoded: Tensor  # (B, C, h, w) what was quantized, such as unit vectors under l2_norm
    codes: Tensor  # (B, h, w) int64 in [0, V)
    codebook_loss: Tensor  # pulls the codes to the latents; 0 where no code is learned
    commitment_loss: Tensor  # pulls the latents to their codes
    entropy_loss: Tensor  # low: each latent is sure of its code, and all codes are used; 0 unless asked for


class Quantizer(nn.Module):
    """A way to make codes of latents. A kind of quantizer is a subclass and a line in QUANTIZERS. It is made from the
    tokenizer's configuration, whose code_dim is C and codebook_size is V, and raises UserError for values that it
    cannot serve."""

    @classmethod
    def check_training(cls, config: TokenizerTrainConfig) -> None:
        """Raise UserError for training settings that this kind cannot serve; by default, those that need a codebook."""
        for name in ("dead_code_steps", "entropy_weight"):
            if value := getattr(config, name):
                raise UserError(
                    f"{name} is {value}, expected 0: the quantizer '{config.model.quantizer}' has no codebook"
                )

    def forward(self, latents: Tensor, entropy_temperature: float = 0.0, rounding: bool = True) -> Quantized:
        """(B, C, h, w) -> Quantized, all in float32 even under autocast.

        entropy_temperature: of the softmax over distances in the entropy loss (LlamaGen: 0.01); 0 = no entropy loss.
        rounding False: the decoder gets the latents themselves and there is no commitment loss, while the codebook
        still follows the latents. Used for the first steps, because a new encoder learns the colour of a patch first:
        detail finer than the distance between codes would be rounded off, so the decoder could never learn to use it,
        and the commitment loss would remove it. In a plain autoencoder the latents spread over all of code_dim."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, h, w) int64 in [0, V) -> (B, C, h, w) float32, as the decoder saw them in training."""
        raise NotImplementedError


class VectorQuantizer(Quantizer):
    """Nearest-code lookup. l2_norm compares unit vectors and returns unit codes (ViT-VQGAN, arXiv 2110.04627, as in
    LlamaGen); without it plain vectors are compared (taming-transformers)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.l2_norm, size = config.l2_norm, config.codebook_size
        codebook = torch.empty(size, config.code_dim).uniform_(-1 / size, 1 / size)
        self.codebook = nn.Parameter(self._normalise(codebook))

    @classmethod
    def check_training(cls, config: TokenizerTrainConfig) -> None:
        pass  # it serves them all

    def forward(self, latents: Tensor, entropy_temperature: float = 0.0, rounding: bool = True) -> Quantized:
        """As in Quantizer. The entropy loss holds (B * h * w, V) numbers for the backward pass."""
        with torch.autocast(latents.device.type, enabled=False):
            flat = self._normalise(rearrange(latents.float(), "b c h w -> (b h w) c"))
            codebook = self._normalise(self.codebook.float())
            codes = nearest(flat, codebook)
            chosen = codebook[codes]
            if entropy_temperature > 0:
                entropy_loss = assignment_entropy(flat, codebook, entropy_temperature)
            else:
                entropy_loss = flat.new_zeros(())
            straight_through = flat + (chosen - flat).detach()
            batch, _, height, _ = latents.shape

            def to_grid(vectors: Tensor) -> Tensor:
                return rearrange(vectors, "(b h w) c -> b c h w", b=batch, h=height)

            return Quantized(
                latents=to_grid(straight_through if rounding else flat),
                encoded=to_grid(flat),
                codes=rearrange(codes, "(b h w) -> b h w", b=batch, h=height),
                codebook_loss=F.mse_loss(chosen, flat.detach()),
                commitment_loss=F.mse_loss(flat, chosen.detach()) if rounding else flat.new_zeros(()),
                entropy_loss=entropy_loss,
            )

    def lookup(self, codes: Tensor) -> Tensor:
        return rearrange(self._normalise(self.codebook.float())[codes], "b h w c -> b c h w")

    def revive_dead_codes(
        self, idle_steps: Tensor, counts: Tensor, candidates: Tensor, limit: int, uniforms: Tensor
    ) -> Tensor:
        """revive_dead_codes of this codebook."""
        return revive_dead_codes(self.codebook, idle_steps, counts, candidates, limit, uniforms)

    def _normalise(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors


# What the configuration's `quantizer` may be. A new kind is a class and a line here.
QUANTIZERS: dict[str, type[Quantizer]] = {"vq": VectorQuantizer}


def quantizer_named(name: str) -> type[Quantizer]:
    if name not in QUANTIZERS:
        raise UserError(f"model.quantizer is '{name}', expected one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]


@torch.no_grad()
def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """(n, C), (V, C) -> (n,) int64 index of the nearest row in squared distance; searched in slices of n, because the
    whole (n, V) table of LlamaGen's VQ-16 at batch 128 would be 2 GB."""
    rows = max(1, _CHUNK // len(codebook))
    return torch.cat([_distances(part, codebook).argmin(dim=1) for part in latents.split(rows)])


def assignment_entropy(latents: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """(n, C), (V, C) -> mean entropy of each latent's soft assignment minus the entropy of the mean assignment, in
    nats, with assignment = softmax(-distance / temperature). Source: MaskGIT's tokenizer loss, as in LlamaGen."""
    log_shares = F.log_softmax(-_distances(latents, codebook) / temperature, dim=1)  # (n, V)
    shares = log_shares.exp()
    of_each = -(shares * log_shares).sum(dim=1).mean()
    mean_share = shares.mean(dim=0)
    of_mean = -(mean_share * (mean_share + 1e-5).log()).sum()
    return of_each - of_mean


def _distances(latents: Tensor, codebook: Tensor) -> Tensor:
    return (latents**2).sum(1, keepdim=True) + (codebook**2).sum(1) - 2 * latents @ codebook.T


def count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """int64 codes of any shape -> (V,) int64, how often each occurs."""
    flat = codes.flatten()
    # torch.bincount would synchronise on a GPU, because the size of its result depends on the largest code.
    return torch.zeros(codebook_size, dtype=torch.int64, device=codes.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


def usage(counts: Tensor) -> tuple[float, float]:
    """(V,) counts -> (share of the V codes that occur, perplexity). Perplexity is exp of the entropy of the codes'
    frequencies: V when all are equally frequent, 1 when only one occurs."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


@torch.no_grad()
def revive_dead_codes(
    codebook: Tensor, idle_steps: Tensor, counts: Tensor, candidates: Tensor, limit: int, uniforms: Tensor
) -> Tensor:
    """Move each code that no latent chose for `limit` steps onto a latent of this step; changes codebook and
    idle_steps in place and returns how many moved (0-dim int64). Given equal arguments every rank does the same.

    codebook (V, C) parameter; idle_steps (V,) int64, the state to keep between steps; counts (V,) this step's code
    counts over all ranks; candidates (n, C) latents, the same on all ranks; uniforms (V,) in [0, 1) choose among them.
    """
    idle_steps.add_(1).masked_fill_(counts > 0, 0)
    dead = idle_steps >= limit
    picked = candidates[(uniforms * len(candidates)).long()].to(codebook.dtype)
    codebook.copy_(torch.where(dead[:, None], picked, codebook))  # indexing by `dead` would synchronise
    idle_steps.masked_fill_(dead, 0)
    return dead.sum()
