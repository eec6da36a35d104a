"""Folders of images, one sub-folder a class: listing them, and reading them in worker processes."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mutor_vision.errors import DataError, UserError
from mutor_vision.images import EXTENSIONS, center_crop, random_crop, read_image, to_tensor
from mutor_vision.keyed_random import permutation, uniforms

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


@dataclass(frozen=True)
class ImageFolder:
    """root/<class>/**/*.{jpg,jpeg,png,webp}, in an order that depends on the names alone. Labels number the class
    folders in sorted order, as torchvision's ImageFolder does."""

    root: Path
    paths: list[str]  # relative to root, with '/'
    labels: list[int]  # of each path, in [0, len(class_names))
    class_names: list[str]  # names of the class folders

    @classmethod
    def open(cls, root: str | Path) -> "ImageFolder":
        """List a folder without opening an image. Names that begin with a dot are ignored, as are other extensions.
        Raises DataError when it is missing, a file, without class folders, or has a class without an image."""
        root = Path(root)
        _check_root(root)
        class_names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
        if not class_names:
            loose = any(e.name.lower().endswith(EXTENSIONS) for e in os.scandir(root))
            found = "images directly in it and no class folders" if loose else "no class folders"
            raise DataError(f"{root} has {found}; expected one sub-folder of images for each class")
        paths, labels = [], []
        for label, name in enumerate(class_names):
            images = _images_below(root / name, name, (os.path.realpath(root),))
            paths += images
            labels += [label] * len(images)
        if not paths:
            raise DataError(f"{root} holds no image; expected files ending in {', '.join(EXTENSIONS)}")
        if empty := sorted(set(range(len(class_names))) - set(labels)):
            raise DataError(
                f"class folder {root / class_names[empty[0]]} holds no image ({', '.join(EXTENSIONS)}); "
                "fill it or remove it"
            )
        return cls(root, paths, labels, class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def fingerprint(self) -> str:
        """sha256 (hex) over every relative path and its size in bytes."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(os.fsencode(f"{path}\0{(self.root / path).stat().st_size}\n"))
        return digest.hexdigest()


class TrainingCrops(Dataset):
    """Position k of training -> uint8 (3, size, size): image `permutation(epoch)[k % n]` with a crop keyed by k, so
    that k alone says what step, process and restart would read. indices are the images of `folder` to train on."""

    def __init__(self, folder: ImageFolder, indices: np.ndarray, size: int, seed: int, min_scale: float):
        self.folder, self.indices, self.size, self.seed, self.min_scale = folder, indices, size, seed, min_scale
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, k: int) -> Tensor:
        epoch, place = divmod(k, len(self.indices))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, "order", epoch, len(self.indices))
        image = read_image(self.folder.root / self.folder.paths[self.indices[self._order[place]]])
        if self.min_scale == 1:
            return to_tensor(center_crop(image, self.size))
        draws = uniforms(self.seed, "crop", np.array([k]), 4)[0]
        return to_tensor(random_crop(image, self.size, draws, self.min_scale))


class Views(Dataset):
    """Image number i of a folder -> uint8 (views, 3, size, size), cut by `crops`: (image, size) -> list of images."""

    def __init__(self, folder: ImageFolder, size: int, crops: Callable[[Image.Image, int], list[Image.Image]]):
        self.folder, self.size, self.crops = folder, size, crops

    def __getitem__(self, i: int) -> Tensor:
        image = read_image(self.folder.root / self.folder.paths[i])
        return torch.stack([to_tensor(view) for view in self.crops(image, self.size)])


def read_batches(dataset: Dataset, batches: Iterable[Iterable[int]], workers: int) -> Iterator[Tensor]:
    """The items of `dataset` at each batch's indices, stacked, in order, read ahead by `workers` processes (0 = none).
    Raises the DataError of an unreadable image here, as one clear line, not as a worker's traceback."""
    if workers < 0:
        raise UserError(f"workers is {workers}, expected 0 or more")
    loader = DataLoader(
        _ErrorsAsItems(dataset), batch_sampler=batches, num_workers=workers, collate_fn=_stack,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def batched(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Slices of at most `size` indices, in order."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


def check_apart(data: str | Path, out: str | Path) -> None:
    """Raise UserError when one folder contains the other: results among the images would become a class."""
    source, target = Path(data).resolve(), Path(out).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"output {out} and images {data} lie in one another; give folders apart")


class _ErrorsAsItems(Dataset):
    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


def _stack(items: list[Tensor | UserError]) -> Tensor | UserError:
    errors = [item for item in items if isinstance(item, UserError)]
    return errors[0] if errors else torch.stack(items)


def _check_root(root: Path) -> None:
    if root.is_dir():
        return
    if root.is_file():
        archive = root.suffix.lower() in ARCHIVES
        raise DataError(f"{root} is {'an archive: extract it first' if archive else 'a file, expected a folder'}")
    parent = next(p for p in root.absolute().parents if p.is_dir())
    raise DataError(f"{root} does not exist; the nearest folder that does is {parent}")


def _images_below(folder: Path, relative: str, above: tuple[str, ...]) -> list[str]:
    """Relative paths of the images in folder and its sub-folders. above: real paths of the folders that contain it."""
    here = os.path.realpath(folder)
    if here in above:
        raise DataError(f"{folder} is a link to a folder that contains it; remove it")
    images, folders = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(entry.name)
        elif entry.name.lower().endswith(EXTENSIONS):
            if not entry.is_file():
                raise DataError(f"{entry.path} is a broken link or not a regular file; remove it")
            images.append(f"{relative}/{entry.name}")
    for name in folders:
        images += _images_below(folder / name, f"{relative}/{name}", (*above, here))
    return images
