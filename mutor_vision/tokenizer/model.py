"""VQTokenizer: images -> codes (h, w) -> images. The convolutions are diffusers' autoencoder blocks, which with the
default configuration are LlamaGen's VQ-16 layer for layer; the quantizer is one of `quantizer.QUANTIZERS`.

Legend: B batch, H x W pixels, h x w codes, V codebook size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutor_vision.config import TokenizerConfig, TokenizerTrainConfig
from mutor_vision.errors import UserError
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import state_sha256
from mutor_vision.tokenizer.quantizer import Quantized, quantizer_named


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructed images, not clamped so that the loss sees the whole error, and the quantizer's result."""

    images: Tensor  # (B, 3, H, W) float, about [-1, 1]
    quantized: Quantized


class VQTokenizer(nn.Module):
    """A VQ autoencoder of images whose sides are multiples of config.downsample."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        from diffusers.models.autoencoders.vae import Decoder, Encoder  # here, because it takes seconds to import

        self.config = config
        levels = len(config.channels)
        down = ["DownEncoderBlock2D"] * levels
        up = ["UpDecoderBlock2D"] * levels
        if config.attention:  # at the lowest resolution only: the encoder's last level, the decoder's first
            down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
        layers: dict[str, Any] = {
            "block_out_channels": config.channels,
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_groups,
            "mid_block_add_attention": config.attention,
        }
        self.encoder = Encoder(
            in_channels=3, out_channels=config.latent_channels, down_block_types=tuple(down), double_z=False, **layers
        )
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.quantizer = quantizer_named(config.quantizer)(config)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = Decoder(
            in_channels=config.latent_channels, out_channels=3, up_block_types=tuple(up), norm_type="group", **layers
        )

    def forward(self, images: Tensor, entropy_temperature: float = 0.0, rounding: bool = True) -> Reconstruction:
        """(B, 3, H, W) float in [-1, 1] -> Reconstruction, with gradients. For the rest see Quantizer."""
        quantized = self.quantizer(self._latents(images), entropy_temperature, rounding)
        return Reconstruction(self._images(quantized.latents), quantized)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, h, w) int64 codes in [0, V)."""
        return self.quantizer(self._latents(images)).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) int64 codes in [0, V) -> (B, 3, H, W) float32 in [-1, 1]."""
        return self._images(self.quantizer.lookup(codes)).float().clamp_(-1, 1)

    def _latents(self, images: Tensor) -> Tensor:
        side = self.config.downsample
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise UserError(
                f"images have shape {tuple(images.shape)}, expected (B, 3, H, W) with H and W multiples of {side}"
            )
        return self.quant_conv(self.encoder(images))

    def _images(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu", weights: str = "best") -> VQTokenizer:
    """A run, a checkpoint or an exported tokenizer -> VQTokenizer in eval mode whose parameters take no gradient.
    weights: 'best' (EMA where there is one), 'ema' or 'model'. Raises UserError, IntegrityError or MismatchError."""
    folder = checkpoint.resolve(tokenizer_folder(path))
    config = checkpoint.read_config(folder, "tokenizer", TokenizerTrainConfig)
    tokenizer = VQTokenizer(config.model)
    checkpoint.load_strictly(tokenizer, checkpoint.read_weights(folder, weights), folder)
    return tokenizer.eval().requires_grad_(False).to(device)


def tokenizer_identity(tokenizer: VQTokenizer | str | Path, weights: str = "best") -> str:
    """files.state_sha256 of all weights: the same for a run, its exported copy and the loaded module. weights: which
    ones of a path; ignored for a module."""
    if isinstance(tokenizer, nn.Module):
        tensors = tokenizer.state_dict()
    else:
        tensors = checkpoint.read_weights(checkpoint.resolve(tokenizer_folder(tokenizer)), weights)
    return state_sha256(tensors, "\n")


def tokenizer_folder(path: str | Path) -> Path:
    """What a user may name (a run, a checkpoint, an exported tokenizer, its model.safetensors) -> the folder."""
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".ckpt"):
        raise UserError(f"{path} is a PyTorch file of another project; `mutor convert` makes a tokenizer of it")
    return path.parent if path.name == "model.safetensors" else path
