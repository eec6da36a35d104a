"""A perceptual distance in the features of any timm network.

It is LPIPS without learned heads (Zhang et al. 2018, arXiv 1801.03924, equation 1 with every w_l = 1): the features of
each stage are scaled to unit length at every place, and their squared differences averaged over places. With a network
trained on ImageNet it keeps textures and objects that a pixel loss blurs. losses.LPIPS is the published form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutor_vision.errors import UserError
from mutor_vision.storage.timm_networks import timm_network


class TimmDistance(nn.Module):
    """Perceptual distance by the stages of a timm network, frozen.

    name: 'timm:NAME[@SIZE]', images being resized to SIZE x SIZE pixels (bicubic, antialias), or left as they are;
    weights: a file with timm's names for its tensors, '' = timm's own, downloaded; stages: which of the network's
    stages, from 0. Raises UserError, DataError, IntegrityError or MismatchError."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str = "", stages: tuple[int, ...] = (0, 1, 2, 3)):
        super().__init__()
        network = timm_network(name.removeprefix("timm:"), weights or None)
        self.network, self.size = network.model, network.size if "@" in name else 0
        if not hasattr(self.network, "forward_intermediates"):
            raise UserError(f"perceptual_network '{name}' does not give its middle layers; give another")
        count = len(self.network.feature_info)
        if wrong := [stage for stage in stages if not 0 <= stage < count]:
            raise UserError(f"perceptual_stages has {wrong[0]}, expected 0 to {count - 1}: '{name}' has {count} stages")
        for name, values in (("mean", network.mean), ("std", network.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.stages = list(stages)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "TimmDistance":
        return super().train(False)  # its normalisation keeps the statistics that its weights were trained with

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] twice -> (B,) float32 distances, 0 = equal. Gradients reach `others` alone."""
        with torch.no_grad():
            of_images = self._features(images)
        distance = images.new_zeros(len(images), dtype=torch.float32)
        for one, other in zip(of_images, self._features(others), strict=True):
            difference = F.normalize(one.float(), dim=1, eps=1e-10) - F.normalize(other.float(), dim=1, eps=1e-10)
            distance = distance + difference.square().sum(dim=1).mean(dim=(1, 2))
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        images = images.float()  # the resize has no bfloat16 kernel on a CPU
        if self.size and tuple(images.shape[-2:]) != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        images = ((images + 1) / 2 - self.mean) / self.std
        return self.network.forward_intermediates(
            images, indices=self.stages, intermediates_only=True, output_fmt="NCHW"
        )
