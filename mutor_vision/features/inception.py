"""ADM's Inception network: torch-fidelity's port of the graph of 2015-12-05 with its TensorFlow-exact resize, and the
spatial features of sFID that it lacks.

    pool     (B, 2048)  average pool: FID, precision and recall, KID
    spatial  (B, 2023)  first 7 channels of Mixed_6d.branch1x1, 17 x 17, channels last as in TensorFlow: sFID
    logits   (B, 1008)  pool times the classifier's weights, without its bias: Inception Score

Source: guided-diffusion evaluations/evaluator.py (`pool_3:0`, `mixed_6/conv:0`, softmax without bias).
"""

import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from einops import rearrange
from torch import Tensor, nn

from mutor_vision.errors import DataError, IntegrityError
from mutor_vision.features.extractors import Extractor
from mutor_vision.storage.checkpoint import load_strictly
from mutor_vision.storage.downloads import check_cache, ending_downloads, host_answers
from mutor_vision.storage.files import sha256, state_sha256
from mutor_vision.storage.foreign import read_state

PUBLISHED = "6726825d"  # the first digits of the published file's sha256, as its name says
FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
SPATIAL_CHANNELS = 7


class InceptionFeatures(Extractor):
    """uint8 (B, 3, H, W) -> {'pool', 'spatial', 'logits'}, float32. `identity` goes into protocol blocks."""

    layers = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}
    class_names: tuple[str, ...] = ()  # 1008 outputs in an order of their own: no per-class accuracy from them

    def __init__(self, network: Any, identity: dict, is_random: bool):
        super().__init__()
        self.network = network
        self.is_random = is_random
        self.identity = {"name": "inception", "resize": "bilinear to 299, TensorFlow 1 style, no antialias"} | identity
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.eval().requires_grad_(False)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        # Channels last, as ADM's mu_s and sigma_s have them: TensorFlow's order.
        self._spatial = rearrange(output[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)").float()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images)
        return {"pool": pool, "spatial": self._spatial, "logits": logits}


def load_inception(weights: str | None = None, allow_unknown: bool = False) -> InceptionFeatures:
    """Inception with weights from a file, 'random' (plumbing only), or None: the published file from torch.hub's
    folder, downloaded by torch-fidelity's address when it is not there.

    Raises IntegrityError when a file is missing, damaged, or (unless `allow_unknown`) not the published one: another
    Inception gives plausible numbers that compare with no published ones.
    """
    if weights == "random":
        network = _network_without_weights()
        identity = {"weights": "random", "state_sha256": state_sha256(network.state_dict())}
        return InceptionFeatures(network, identity, is_random=True)
    path = Path(weights) if weights is not None else _published_file()
    if not path.is_file():
        raise IntegrityError(f"Inception weights {path} do not exist; expected {FILE_NAME}, or --weights random")
    digest = sha256(path)
    if not digest.startswith(PUBLISHED) and not allow_unknown:
        with open(path, "rb") as file:
            first = repr(file.read(16))[1:]
        raise IntegrityError(
            f"Inception weights {path} have sha256 {digest[:8]} (the file begins with {first}), expected {PUBLISHED}; "
            f"download {FILE_NAME} again, or pass --allow-unknown-weights, which marks the result"
        )
    state = read_state(path)
    network = _network_without_weights()
    load_strictly(network, state, path)
    kind = "published" if digest.startswith(PUBLISHED) else "unknown"
    identity = {"weights": kind, "weights_sha256": digest, "state_sha256": state_sha256(network.state_dict())}
    return InceptionFeatures(network, identity, is_random=False)


def _network_without_weights() -> nn.Module:
    """torch-fidelity's network with seeded random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        # The constructor unpickles its weights file without weights_only, which could run code. So it gets an empty
        # file, and storage.foreign reads the real one.
        def load_state_dict(self, state, *rest, **named):
            return super().load_state_dict(state, *rest, **named) if state else None

    with tempfile.NamedTemporaryFile(suffix=".pth") as empty, torch.random.fork_rng(devices=[]):
        torch.save({}, empty.name)
        torch.manual_seed(0)
        network = Unloaded("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty.name)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # torch's default shrinks the signal to 1e-8 over 94 layers
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return network


def _published_file() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / FILE_NAME
    if os.path.isfile(path):  # also False, instead of an error, where the folder may not be read
        return path
    check_cache(folder, "TORCH_HOME")
    try:
        if not host_answers(URL_INCEPTION_V3):
            raise OSError(f"{urlsplit(URL_INCEPTION_V3).hostname} does not answer")
        with ending_downloads():
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=PUBLISHED)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cannot download the Inception weights ({error}); put {FILE_NAME} at {path}, pass --weights FILE, or use "
            "features that need no download (--features FOLDER, made by eval/train_features.py)"
        ) from None
    return path
