"""Feature extractors by one string: 'inception', 'timm:NAME[@SIZE]', or the folder of a network that
eval/train_features.py trained.

An extractor is a module with
    forward     uint8 (B, 3, H, W) -> {'pool': (B, D), ...} float32, 'logits' (B, C) where it classifies
    layers      {'pool': D, ...}: what forward returns, and how wide
    class_names its classes, in the order of its logits; () when they have no names
    identity    name, resize rule and hashes, for protocol blocks
    is_random   True where weights are random: its numbers test that everything runs, and measure nothing
"""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutor_vision.errors import IntegrityError, UserError, short
from mutor_vision.storage.checkpoint import load_strictly
from mutor_vision.storage.files import sha256, state_sha256
from mutor_vision.storage.foreign import read_state
from mutor_vision.storage.seal import read_sealed
from mutor_vision.storage.timm_networks import timm_network


class Extractor(nn.Module):
    """What the top of this file describes."""

    layers: dict[str, int]
    class_names: tuple[str, ...]
    identity: dict[str, Any]
    is_random: bool


class TimmFeatures(Extractor):
    """A timm model's features before its classifier. Images are resized to size x size (bicubic with antialias, on
    uint8, as Pillow does) and normalised with the model's own mean and deviation."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Any,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        identity: dict,
        class_names: tuple[str, ...] = (),
        is_random: bool = False,
    ):
        super().__init__()
        self.model = model
        self.size = size
        self.class_names = class_names
        self.is_random = is_random
        self.layers = {"pool": model.head_hidden_size}
        if not isinstance(model.get_classifier(), nn.Identity):
            self.layers["logits"] = model.num_classes
        resize = f"bicubic to {size}x{size}, antialias, on uint8"
        self.identity = identity | {"resize": resize, "mean": list(mean), "std": list(std)}
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = resize(images, self.size)
        try:
            hidden = self.model.forward_features((images.float() / 255 - self.mean) / self.std)
        except (AssertionError, RuntimeError) as error:
            # Of memory (whose text may advise max_split_size), or of the device.
            short_of_memory = isinstance(error, torch.OutOfMemoryError)
            if short_of_memory or (isinstance(error, RuntimeError) and "size" not in str(error)):
                raise
            raise UserError(
                f"{self.identity['name']} cannot take images of {self.size} pixels ({short(error)}); give another size "
                "behind @, or none"
            ) from None
        features = {"pool": self.model.forward_head(hidden, pre_logits=True).float()}
        if "logits" in self.layers:
            features["logits"] = self.model.forward_head(hidden).float()
        return features


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, size, size), bicubic with antialias; unchanged when the size fits."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize as torchvision_resize

    return torchvision_resize(images, [size, size], InterpolationMode.BICUBIC, antialias=True)


def load_extractor(features: str, weights: str | None = None, allow_unknown: bool = False) -> Extractor:
    """'inception' | 'timm:NAME[@SIZE]' | folder made by eval/train_features.py -> extractor, on the CPU.

    weights: None (published weights, downloaded by torch.hub or timm when absent), 'random', a file, or for timm
    'package' (of an installed package, such as the extra `offline` brings)."""
    if features == "inception":
        from mutor_vision.features.inception import load_inception

        return load_inception(weights, allow_unknown)
    if features.startswith("timm:"):
        return load_timm(features.removeprefix("timm:"), weights)
    if features and Path(features).is_dir():  # Path("") is the current folder
        if weights is not None:
            raise UserError(f"--weights {weights} with --features {features}: a trained network has its own; drop it")
        return load_trained(Path(features))
    raise UserError(
        f"features is '{features}', expected inception, timm:NAME[@SIZE], or a folder made by eval/train_features.py"
    )


def load_timm(name: str, weights: str | None = None) -> TimmFeatures:
    """'NAME' or 'NAME@SIZE' (pixels; without it the model's own input size). weights: as in `timm_network`."""
    import timm

    network = timm_network(name, weights)
    is_random = weights == "random"
    class_names = ()
    if not isinstance(network.model.get_classifier(), nn.Identity) and network.model.num_classes == 1000:
        class_names = () if is_random else tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())
    return TimmFeatures(
        network.model, network.size, network.mean, network.std, identity=network.identity, class_names=class_names,
        is_random=is_random,
    )  # fmt: skip


def load_trained(folder: Path) -> TimmFeatures:
    """A folder with config.json and model.safetensors, written by `features.train.train`."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"{folder} has no config.json; expected a folder made by eval/train_features.py")
    config = read_sealed(config_path)
    if config.get("kind") != "features":
        raise UserError(f"{folder} holds {config.get('kind', 'something else')}, expected features")
    _check_config(config, config_path)
    path = folder / "model.safetensors"
    if not path.is_file() or sha256(path) != config["weights_sha256"]:
        raise IntegrityError(f"{path} is missing or not the file that config.json names; train the features again")
    state = read_state(path)
    model = create_small(config["architecture"], len(config["class_names"]), config["architecture_settings"])
    load_strictly(model, state, path)
    identity = {
        "name": f"trained:{config['architecture']}",
        "weights": "trained",
        "weights_sha256": config["weights_sha256"],
        "state_sha256": state_sha256(model.state_dict()),
        "held_out_accuracy": config["held_out_accuracy"],
        "held_out_images": config["held_out_images"],
        "trained_on": config["data"],
    }
    return TimmFeatures(
        model, config["image_size"], config["mean"], config["std"], identity=identity,
        class_names=tuple(config["class_names"]),
    )  # fmt: skip


def _check_config(config: dict, path: Path) -> None:
    """Raise IntegrityError unless config.json has every entry that train_features writes, of its type and range."""
    three = lambda value: isinstance(value, list) and len(value) == 3 and all(  # noqa: E731
        isinstance(part, float) and 0 <= part <= 1 for part in value
    )  # fmt: skip
    names = config.get("class_names")
    for name, valid in (
        ("architecture", isinstance(config.get("architecture"), str)),
        ("architecture_settings", isinstance(config.get("architecture_settings"), dict)),
        ("class_names", isinstance(names, list) and len(names) > 1 and all(isinstance(one, str) for one in names)),
        ("image_size", type(config.get("image_size")) is int and 1 <= config["image_size"] <= 4096),
        ("mean", three(config.get("mean"))),
        ("std", three(config.get("std")) and min(config["std"]) > 0),
        ("held_out_accuracy", isinstance(config.get("held_out_accuracy"), float)),
        ("held_out_images", type(config.get("held_out_images")) is int),
        ("data", isinstance(config.get("data"), str)),
        ("weights_sha256", isinstance(config.get("weights_sha256"), str)),
    ):
        if not valid:
            text = str(config.get(name, "missing"))[:60]
            raise IntegrityError(f"{path}: '{name}' is {text}, not what train_features wrote; train the features again")


def create_small(architecture: str, num_classes: int, settings: dict) -> nn.Module:
    """A timm classifier with random weights. `settings` go to timm.create_model."""
    import timm

    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        raise UserError(f"timm has no model '{architecture}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=num_classes, **settings)
    except Exception as error:  # timm raises many kinds for settings that a model does not have
        raise UserError(f"timm cannot make '{architecture}' with {settings}: {short(error)}") from None


def identity_text(extractor: Extractor) -> str:
    """The identity as one line of JSON with sorted keys, so equal extractors have equal texts."""
    return json.dumps(extractor.identity, sort_keys=True)
