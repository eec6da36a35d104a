"""A small classifier of one's own images, whose features replace Inception's: for images unlike ImageNet's, and for
machines that cannot download Inception. Its numbers compare only with numbers of the same network."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from mutor_vision.errors import DataError, UserError
from mutor_vision.features.extractors import create_small
from mutor_vision.progress import progress
from mutor_vision.storage.files import sha256, write_tensors
from mutor_vision.storage.seal import write_sealed

MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class FeatureTraining:
    """A timm classifier and how it is trained. Defaults: 1.2 M parameters, 128 features, minutes on a CPU."""

    architecture: str = "resnet10t"  # any timm model
    channels: tuple[int, ...] = (32, 64, 96, 128)  # per stage of a timm ResNet; () = the model's own
    stem_width: int = 16  # 0 = the model's own
    epochs: int = 20  # passes over the training images
    batch_size: int = 64
    lr: float = 2e-3  # AdamW's highest, of one cycle
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    shift: int = 4  # pixels of random translation, 0 = off
    flip: bool = True  # mirror half of the images; off for digits and letters
    seed: int = 0

    def settings(self) -> dict:
        """Arguments of timm.create_model."""
        settings = {"channels": list(self.channels)} if self.channels else {}
        return settings | ({"stem_width": self.stem_width} if self.stem_width else {})


def train(
    images: Tensor,
    labels: Tensor,
    held_out_images: Tensor,
    held_out_labels: Tensor,
    class_names: list[str],
    config: FeatureTraining,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    data: str = "",
) -> float:
    """uint8 (N, 3, S, S) with int64 labels (N,), and the same held out -> OUT/config.json and model.safetensors, which
    `--features OUT` loads. Returns the accuracy on held-out images. `data` names the images in the protocol."""

    if len(class_names) < 2:
        raise DataError(f"there is {len(class_names)} class, expected 2 or more; a classifier needs them to tell apart")
    if min(len(images), len(held_out_images)) < 1 or config.epochs < 1 or config.batch_size < 1:
        raise UserError("features need images to train on, images held out, and --epochs and --batch-size of 1 or more")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = create_small(config.architecture, len(class_names), config.settings()).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    per_epoch = -(-len(images) // config.batch_size)
    steps = config.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(steps, 2), pct_start=0.2)
    model.train()
    with progress(total=steps, desc="features", unit="step") as bar:
        for _ in range(config.epochs):
            for chosen in torch.randperm(len(images), generator=generator).split(config.batch_size):
                batch = _augment(images[chosen], config, generator).to(device)
                target = labels[chosen].to(device)
                loss = cross_entropy(model(_normalise(batch)), target, label_smoothing=config.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    accuracy = _accuracy(model.eval(), held_out_images, held_out_labels, config.batch_size, device)
    write_tensors(out / "model.safetensors", model.state_dict())
    mean, std = MEAN_STD
    write_sealed(out / "config.json", {
        "kind": "features", "architecture": config.architecture,
        "architecture_settings": config.settings(), "image_size": images.shape[-1], "mean": mean, "std": std,
        "class_names": class_names, "held_out_accuracy": accuracy, "held_out_images": len(held_out_images),
        "data": data, "images": len(images), "epochs": config.epochs, "seed": config.seed,
        "weights_sha256": sha256(out / "model.safetensors"),
    })  # fmt: skip
    return accuracy


def _augment(images: Tensor, config: FeatureTraining, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `shift` pixels (the edge repeated) and mirrored by chance."""
    count, _, height, width = images.shape
    if config.shift:
        padded = pad(images.float(), [config.shift] * 4, mode="replicate").to(torch.uint8)
        tops, lefts = torch.randint(2 * config.shift + 1, (2, count), generator=generator).tolist()
        cut = [
            image[:, top : top + height, left : left + width]
            for image, top, left in zip(padded, tops, lefts, strict=True)
        ]
        images = torch.stack(cut)
    if config.flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


def _normalise(images: Tensor) -> Tensor:
    # The same as TimmFeatures computes from MEAN_STD, which is saved with the weights.
    return (images.float() / 255 - 0.5) / 0.5


@torch.no_grad()
def _accuracy(model, images: Tensor, labels: Tensor, batch_size: int, device) -> float:
    right = 0
    for batch, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += (model(_normalise(batch.to(device))).argmax(1).cpu() == target).sum().item()
    return right / len(images)
