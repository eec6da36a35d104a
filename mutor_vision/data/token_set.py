"""A token set on disk: the codes of every view of every image, made by tokenizers/encode.py.

    manifest.json        what it is; written last, so a set that has one is complete
    codes-00000.npy      uint16 (uint32 when V > 65536), (images, views, N), row-major codes; never pickled
    labels-00000.npy     int64 (images,)
    features-00000.npy   float16 (images, views, N, F), where a network's features were asked for
    tokenizer/           a copy of the tokenizer, so that later commands can decode

Legend: n images, h x w grid, N = h * w, V codebook size, F width of the features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import IntegrityError, UserError
from mutor_vision.runtime import to_device
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import check_form, map_array, read_json, sha256, written
from mutor_vision.storage.seal import read_sealed, write_sealed

FORMAT = 1  # of the plan; a manifest's own says whether it is sealed (storage/seal.py)
PLAN = "plan.json"  # the settings of an encoding that has begun; it continues with the same settings only
# The form of what is read in a manifest; a run's copy of it is asked for FACTS alone.
FACTS = {"tokenizer_sha256": (str, None), "class_names": [str]}
_MANIFEST = FACTS | {
    "tokenizer_sha256": str, "codebook_size": int, "image_size": int, "grid": [int], "views": [str],
    "shards": [{"file": str, "sha256": str, "labels_file": str, "labels_sha256": str, "images": int}],
}  # fmt: skip
_FEATURES = {"features": {"width": int}, "shards": [{"features_file": str, "features_sha256": str}]}


class TokenSet:
    """A complete, verified token set. Codes are memory-mapped: they are read when they are taken."""

    def __init__(
        self, path: Path, manifest: dict[str, Any], shards: list[np.ndarray], labels: Tensor, features: list[np.ndarray]
    ):
        self.path = path
        self.manifest = manifest
        self.grid: tuple[int, int] = tuple(manifest["grid"])  # (h, w) codes
        self.codebook_size: int = manifest["codebook_size"]
        self.image_size: int = manifest["image_size"]  # pixels, square
        self.class_names: list[str] = manifest["class_names"]
        self.views: list[str] = manifest["views"]  # in the order of the second axis
        self.num_images = len(labels)
        self.num_views = len(self.views)
        self.labels = labels  # (n,) int64 in [0, len(class_names))
        self.tokenizer_path = path / "tokenizer"
        self.tokenizer_identity: str = manifest["tokenizer_sha256"]
        self.features: dict[str, Any] | None = manifest.get("features")  # what made them, and their width; None = none
        self.identity = sha256(path / "manifest.json")  # names the content: the manifest has the hash of every shard
        self._shards, self._features = shards, features
        self._resident: Tensor | None = None
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    @classmethod
    def open(cls, path: str | Path) -> "TokenSet":
        """Open and check everything: sizes, sha256 (1.8 GB/s), code and label ranges. Raises UserError when it is no
        token set, IntegrityError when it is incomplete or damaged, MismatchError when it is of a later
        format."""
        path = Path(path)
        manifest = _read_manifest(path)
        checkpoint.resolve(path / "tokenizer")  # verifies it
        shards, labels, features = [], [], []
        for shard in manifest["shards"]:
            for kind in ("", "labels_", "features_") if "features" in manifest else ("", "labels_"):
                _check_file(path / shard[f"{kind}file"], shard[f"{kind}sha256"])
            codes_shape = (shard["images"], len(manifest["views"]), manifest["grid"][0] * manifest["grid"][1])
            codes = load_array(path / shard["file"], code_dtype(manifest["codebook_size"]), codes_shape)
            label = load_array(path / shard["labels_file"], np.int64, (shard["images"],))
            _check_range(path / shard["file"], "code", codes, manifest["codebook_size"])
            _check_range(path / shard["labels_file"], "label", label, len(manifest["class_names"]))
            shards.append(codes)
            labels.append(torch.from_numpy(np.array(label)))
            if "features" in manifest:
                shape = (*codes_shape, manifest["features"]["width"])
                features.append(load_array(path / shard["features_file"], np.float16, shape))
        return cls(path, manifest, shards, torch.cat(labels), features)

    def take(self, indices: Tensor, views: Tensor) -> Tensor:
        """(B,) int64 image numbers and (B,) int64 view numbers, on the CPU -> (B, h, w) int64 codes, on the CPU or
        where `keep_on` put them."""
        if self._resident is not None:
            indices, views = (to_device(numbers, self._resident.device) for numbers in (indices, views))
            return self._resident[indices, views].long().unflatten(1, self.grid)
        return torch.from_numpy(self._read(self._shards, indices, views).astype(np.int64)).unflatten(1, self.grid)

    def take_features(self, indices: Tensor, views: Tensor) -> Tensor:
        """The same -> (B, N, F) float16 features of the cells in raster order, on the CPU."""
        return torch.from_numpy(self._read(self._features, indices, views))

    def _read(self, column: list[np.ndarray], numbers: Tensor, own_views: Tensor) -> np.ndarray:
        indices, views = numbers.numpy(), own_views.numpy()
        rows = np.empty((len(indices), *column[0].shape[2:]), dtype=column[0].dtype)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shard_of):
            mine = shard_of == number
            rows[mine] = column[number][indices[mine] - self._starts[number], views[mine]]
        return rows

    def keep_on(self, device: torch.device) -> None:
        """Copy all codes to `device`, so that batches are indexed there and no step waits for the host."""
        self._resident = self.codes().to(device)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes in memory."""
        return self.num_images * self.num_views * self.grid[0] * self.grid[1] * _signed(self.codebook_size).itemsize

    def codes(self) -> Tensor:
        """All codes in memory, (n, views, N): int16 where V allows (1.3 GB for ImageNet's two views), else int32."""
        dtype = _signed(self.codebook_size)
        return torch.from_numpy(np.concatenate([shard.astype(dtype) for shard in self._shards]))


def code_dtype(codebook_size: int) -> type:
    """The smallest of uint16 and uint32 that holds every code."""
    return np.uint16 if codebook_size <= 2**16 else np.uint32


def _signed(codebook_size: int) -> np.dtype:
    # torch can index and convert signed integers on every device, but not uint16.
    return np.dtype(np.int16 if codebook_size <= 2**15 else np.int32)


def shard_names(number: int) -> tuple[str, str]:
    """File names of shard `number`: codes, labels."""
    return f"codes-{number:05d}.npy", f"labels-{number:05d}.npy"


def features_name(number: int) -> str:
    """File name of shard `number`'s features."""
    return f"features-{number:05d}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy atomically (files.written)."""
    with written(path) as partial, open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map an .npy file. Raises IntegrityError when it is damaged or has another type or shape."""
    array = map_array(path)
    if array.dtype != dtype or array.shape != shape:
        raise IntegrityError(
            f"{path} holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; "
            "remove it, run encode.py again"
        )
    return array


def write_manifest(path: Path, plan: dict[str, Any], shard_images: list[int]) -> None:
    """Complete a set whose shards are all written: the manifest makes it one. plan: the encoding's settings;
    shard_images: the number of images in each shard."""
    shards = []
    for number, images in enumerate(shard_images):
        codes, labels = shard_names(number)
        shards.append({
            "file": codes, "sha256": sha256(path / codes),
            "labels_file": labels, "labels_sha256": sha256(path / labels), "images": images,
        })  # fmt: skip
    write_sealed(path / "manifest.json", {**plan, "shards": shards})


def write_features(path: Path, identity: dict[str, Any]) -> None:
    """Make the features, whose files are all written, a column of the complete set `path`. identity: what made them,
    and their 'width'."""
    manifest = read_sealed(path / "manifest.json")
    for number, shard in enumerate(manifest["shards"]):
        shard |= {"features_file": features_name(number), "features_sha256": sha256(path / features_name(number))}
    write_sealed(path / "manifest.json", manifest | {"features": identity})


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected a token set made by tokenizers/encode.py")
    if not (path / "manifest.json").is_file():
        if not (path / PLAN).is_file():
            raise UserError(f"{path} has no manifest.json; expected a token set made by tokenizers/encode.py")
        total = read_json(path / PLAN, {"num_shards": int})["num_shards"]
        done = len(list(path.glob("labels-*.npy")))
        raise IntegrityError(f"{path}: token set incomplete: {done} of {total} shards; run encode.py again to continue")
    manifest = read_sealed(path / "manifest.json", _MANIFEST)
    if "features" in manifest:
        check_form(path / "manifest.json", manifest, _FEATURES)
    if len(manifest["grid"]) != 2 or not manifest["shards"]:
        raise IntegrityError(f"{path / 'manifest.json'} has no grid of two sides, or no shards; restore it")
    for number, shard in enumerate(manifest["shards"]):
        if (shard["file"], shard["labels_file"]) != shard_names(number):
            raise IntegrityError(f"{path / 'manifest.json'} names '{shard['file']}' and '{shard['labels_file']}', "
                                 f"expected {' and '.join(shard_names(number))}; it is refused")  # fmt: skip
        if "features" in manifest and shard["features_file"] != features_name(number):
            raise IntegrityError(f"{path / 'manifest.json'} names '{shard['features_file']}', expected "
                                 f"{features_name(number)}; it is refused")  # fmt: skip
    return manifest


def read_facts(run: Path) -> dict[str, Any]:
    """FACTS of a run's token_set.json, the copy of the manifest of the set that it learnt. Raises IntegrityError."""
    return read_sealed(run / "token_set.json", FACTS)


def _check_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; remove manifest.json and run encode.py again")
    if (got := sha256(path)) != expected:
        raise IntegrityError(
            f"{path} is damaged: sha256 {got[:12]}, expected {expected[:12]}; remove it and manifest.json, "
            "run encode.py again"
        )


def _check_range(path: Path, what: str, values: np.ndarray, limit: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= limit):
        raise IntegrityError(f"{path} holds {what} {values.max()}, expected 0 to {limit - 1}; encode again")
