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
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from mutor_vision.errors import DataError, IntegrityError, UserError
from mutor_vision.storage.checkpoint import load_strictly
from mutor_vision.storage.downloads import check_cache, ending_downloads, host_answers
from mutor_vision.storage.files import read_json, sha256, state_sha256
from mutor_vision.storage.foreign import read_state


class TimmFeatures(nn.Module):
    """A timm model's features before its classifier. Images are resized to size x size (bicubic with antialias, on
    uint8, as Pillow does) and normalised with the model's own mean and deviation."""

    def __init__(
        self,
        model: nn.Module,
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
        hidden = self.model.forward_features((images.float() / 255 - self.mean) / self.std)
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


def load_extractor(features: str, weights: str | None = None, allow_unknown: bool = False) -> nn.Module:
    """'inception' | 'timm:NAME[@SIZE]' | folder made by eval/train_features.py -> extractor, on the CPU.

    weights: None (published weights, downloaded by torch.hub or timm when absent), 'random', or a file."""
    if features == "inception":
        from mutor_vision.features.inception import load_inception

        return load_inception(weights, allow_unknown)
    if features.startswith("timm:"):
        return load_timm(features.removeprefix("timm:"), weights)
    if Path(features).is_dir():
        if weights is not None:
            raise UserError(f"--weights {weights} with --features {features}: a trained network has its own; drop it")
        return load_trained(Path(features))
    raise UserError(
        f"features is '{features}', expected inception, timm:NAME[@SIZE], or a folder made by eval/train_features.py"
    )


def load_timm(name: str, weights: str | None = None) -> TimmFeatures:
    """'NAME' or 'NAME@SIZE' (pixels; without it the model's own input size)."""
    import timm

    name, _, size_text = name.partition("@")
    if size_text and not (size_text.isascii() and size_text.isdigit() and 1 <= int(size_text) <= 4096):
        raise UserError(f"size in 'timm:{name}@{size_text}' is '{size_text}', expected pixels, as in timm:{name}@224")
    elsewhere = name.startswith(("hf-hub:", "local-dir:"))
    if not elsewhere and not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_models(pretrained=True), n=1)
        raise UserError(f"timm has no model '{name}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    try:
        config = timm.get_pretrained_cfg(name) if not elsewhere else None
    except RuntimeError:
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")[:8])
        raise UserError(f"timm has no weights '{name}'; it has {tags or 'none of this model'}") from None
    sized = {"img_size": int(size_text)} if size_text and (config is None or config.fixed_input_size) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if weights in (None, "random"):
            model = _create(name, config, sized, pretrained=weights is None)
        else:
            model = _create_from_file(name, config, sized, weights)
    identity = {"name": f"timm:{name}", "weights": weights if weights in (None, "random") else "file"}
    identity["weights"] = identity["weights"] or f"pretrained {model.pretrained_cfg.get('tag', '')}".strip()
    if weights not in (None, "random") and Path(weights).is_file():
        identity["weights_sha256"] = sha256(Path(weights))
    identity["state_sha256"] = state_sha256(model.state_dict())
    settings = timm.data.resolve_model_data_config(model)
    size = int(size_text) if size_text else settings["input_size"][-1]
    class_names = ()
    if not isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 1000 and weights != "random":
        class_names = tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())
    return TimmFeatures(
        model, size, settings["mean"], settings["std"], identity=identity, class_names=class_names,
        is_random=weights == "random",
    )  # fmt: skip


def _create(name: str, config, sized: dict, pretrained: bool) -> nn.Module:
    """A timm model. When the hub's host does not answer, its cache is used at once, without the client's retries."""
    import huggingface_hub.constants as hub
    import timm

    from_hub = name.startswith("hf-hub:") or (config is not None and config.hf_hub_id)
    address = hub.ENDPOINT if from_hub else config.url or "" if config is not None else ""
    wanted = (pretrained and bool(address)) or name.startswith("hf-hub:")
    answers = host_answers(address) if wanted else True
    offline, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE or not answers
    try:
        if wanted and not answers and not from_hub and not _in_torch_hub(address):
            raise OSError(f"{urlsplit(address).hostname} does not answer")
        with ending_downloads():
            return timm.create_model(name, pretrained=pretrained, **sized)
    except Exception as error:  # the hub's client and timm raise many kinds
        if not wanted:
            raise UserError(f"timm cannot make '{name}' ({_short(error)}); give another, or --weights FILE") from None
        if answers and from_hub:
            check_cache(Path(hub.HF_HUB_CACHE), "HF_HOME")
        elif answers:
            check_cache(Path(torch.hub.get_dir()), "TORCH_HOME")
        reason = _short(error) if answers else f"{urlsplit(address).hostname} does not answer, and they are not cached"
        raise DataError(
            f"cannot get the weights of timm model '{name}' ({reason}); pass --weights FILE with a copy of them"
        ) from None
    finally:
        hub.HF_HUB_OFFLINE = offline


def _create_from_file(name: str, config, sized: dict, weights: str) -> nn.Module:
    """A timm model with the weights of a file. Tensors have timm's names, or the names of the model's first publication
    where timm can convert them. timm resizes position embeddings to the image size."""
    import timm

    state = read_state(weights)
    model = _create(name, config, sized, pretrained=False)
    own = {key: value.shape for key, value in model.state_dict().items()}
    if config is not None and own != {key: value.shape for key, value in state.items()}:
        for key, value in state.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise IntegrityError(f"{weights}: '{key}' holds values that are not finite; download it again")
        try:
            given = {"state_dict": dict(state)}
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, **sized)
            model.pretrained_cfg.pop("state_dict")
            return model
        except Exception:  # timm's conversion fails in many ways on names that it does not know
            pass  # load_strictly below names the tensor that is missing
    load_strictly(model, state, weights)
    return model


def _in_torch_hub(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name).is_file()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def load_trained(folder: Path) -> TimmFeatures:
    """A folder with config.json and model.safetensors, written by `features.train.train`."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"{folder} has no config.json; expected a folder made by eval/train_features.py")
    config = read_json(config_path)
    if not isinstance(config, dict) or config.get("kind") != "features" or config.get("format") != 1:
        kind = config.get("kind") if isinstance(config, dict) else "something else"
        raise UserError(f"{folder} holds {kind}, expected features of format 1")
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
        raise UserError(f"timm cannot make '{architecture}' with {settings}: {_short(error)}") from None


def identity_text(extractor: nn.Module) -> str:
    """The identity as one line of JSON with sorted keys, so equal extractors have equal texts."""
    return json.dumps(extractor.identity, sort_keys=True)
