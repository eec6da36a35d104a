"""The tokenizer's losses: pixels, LPIPS, and a PatchGAN with the hinge loss (LlamaGen's vq_loss.py).

The LPIPS weights are not part of this package. `lpips_weights` names one file, .safetensors, or .pt/.pth holding a
plain dict of tensors (read with weights_only=True), with torchvision's VGG16 and the heads of LPIPS 0.1 side by side:

    features.{0,2,5,7,10,12,14,17,19,21,24,26,28}.{weight,bias}     the convolutions, named as torchvision names them
    lin{0,1,2,3,4}.model.1.weight                                   (1, C, 1, 1), C = 64, 128, 256, 512, 512

Other keys (VGG16's classifier) are ignored. Both parts are public: VGG16 is torchvision's VGG16_Weights.IMAGENET1K_V1,
the heads are lpips/weights/v0.1/vgg.pth of github.com/richzhang/PerceptualSimilarity. To make the file:

    vgg16 = torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict()
    heads = torch.load("vgg.pth", weights_only=True)
    torch.save({**vgg16, **heads}, "lpips-vgg16.pt")
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutor_vision.config import TokenizerTrainConfig
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.storage import checkpoint
from mutor_vision.storage.foreign import read_state
from mutor_vision.tokenizer.model import Reconstruction
from mutor_vision.tokenizer.perceptual import TimmDistance

ENTROPY_TEMPERATURE = 0.01  # LlamaGen's


def generator_losses(
    images: Tensor, reconstruction: Reconstruction, config: TokenizerTrainConfig,
    distances: Mapping[str, nn.Module] | nn.ModuleDict = MappingProxyType({}), fake_scores: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Terms of the autoencoder's loss, not weighted, and their weighted sum 'loss', all 0-dim float32.

    images: (B, 3, H, W) in [-1, 1]; distances: of `perceptual_distances`; fake_scores: the discriminator's
    scores of the reconstructions, None before adversarial_start."""
    error = reconstruction.images.float() - images.float()
    quantized = reconstruction.quantized
    weighted = [
        ("l1", config.l1_weight, error.abs().mean()),
        ("l2", config.l2_weight, error.square().mean()),
        ("codebook", config.codebook_weight, quantized.codebook_loss),
        ("commitment", config.commitment_weight, quantized.commitment_loss),
    ]
    if config.entropy_weight > 0:
        weighted.append(("entropy", config.entropy_weight, quantized.entropy_loss))
    for name, distance in distances.items():
        weighted.append((name, getattr(config, f"{name}_weight"), distance(images, reconstruction.images).mean()))
    if fake_scores is not None:
        weighted.append(("adversarial", config.adversarial_weight, -fake_scores.float().mean()))
    terms = {name: value for name, _, value in weighted}
    return {"loss": cast(Tensor, sum(weight * value for _, weight, value in weighted)), **terms}


def perceptual_distances(config: TokenizerTrainConfig) -> nn.ModuleDict:
    """The frozen networks that a configuration asks for, by the name of their loss: images twice -> (B,) distances."""
    distances = nn.ModuleDict()
    if config.lpips_weight > 0:
        distances["lpips"] = LPIPS(config.lpips_weights)
    if config.perceptual_weight > 0:
        distances["perceptual"] = TimmDistance(
            config.perceptual_network, config.perceptual_weights, config.perceptual_stages
        )
    return distances


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Hinge loss, 0-dim: it is 0 once every real patch scores above 1 and every fake patch below -1."""
    return 0.5 * (F.relu(1 - real_scores.float()).mean() + F.relu(1 + fake_scores.float()).mean())


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (pix2pix, arXiv 1611.07004): (B, 3, H, W) -> (B, 1, about H/8, W/8) scores of overlapping patches of
    70 pixels. Defaults: taming-transformers' and LlamaGen's, 2,765,633 parameters."""

    def __init__(self, width: int = 64, layers: int = 3):
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        channels = width
        for layer in range(1, layers + 1):
            wider = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            modules += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels = wider
        super().__init__(*modules, nn.Conv2d(channels, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


class LPIPS(nn.Module):
    """Perceptual distance (Zhang et al. 2018, arXiv 1801.03924), VGG16, version 0.1, without its training dropout.
    Frozen. weights: the file described at the top of this module."""

    shift: Tensor
    scale: Tensor
    _LAST_LAYERS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in torchvision's vgg16.features
    _CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self, weights: str | Path):
        super().__init__()
        from torchvision.models import vgg16

        if not Path(weights).is_file():
            raise UserError(f"lpips_weights is '{weights}', which is no file; see mutor_vision/tokenizer/losses.py")
        tensors = read_state(weights)  # before VGG16 is built, which takes 550 MB: the file may be refused
        ours = {name: value for name, value in tensors.items() if name.startswith("features.")}
        for number in range(len(self._CHANNELS)):
            if (name := f"lin{number}.model.1.weight") not in tensors:
                raise MismatchError(f"{weights} lacks '{name}'; see mutor_vision/tokenizer/losses.py for the format")
            ours[f"heads.{number}"] = tensors[name]
        self.features = vgg16(weights=None).features[:30]
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # else it would overwrite features that are compared
        self.heads = nn.ParameterList(torch.empty(1, channels, 1, 1) for channels in self._CHANNELS)
        # ImageNet's channel means and deviations, moved from [0, 1] to [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        checkpoint.load_strictly(self, ours, weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] twice -> (B,) float32 distances, 0 = equal; H and W at least 16."""
        features = (torch.cat([images, others]) - self.shift) / self.scale
        distance = images.new_zeros(len(images), dtype=torch.float32)
        heads = dict(zip(self._LAST_LAYERS, self.heads, strict=True))
        for number, layer in enumerate(self.features):
            features = layer(features)
            if number in heads:
                unit = F.normalize(features.float(), dim=1, eps=1e-10)
                of_images, of_others = unit.chunk(2)
                distance = distance + ((of_images - of_others).square() * heads[number]).sum(dim=1).mean(dim=(1, 2))
        return distance
