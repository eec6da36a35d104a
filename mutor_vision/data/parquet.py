"""Parquet files of Hugging Face's image datasets as sources: columns image{bytes, path} and label, as
ILSVRC/imagenet-1k has them. Files on this disk alone; nothing is downloaded."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mutor_vision.data.packed import Packed, matching, names_of_numbers, natural_name
from mutor_vision.errors import DataError, IntegrityError, UserError, short
from mutor_vision.names import printable


class ParquetImages(Packed):
    """'train-*.parquet'. Class names are those in the files' own description, else of classes.txt beside them, else the
    numbers. An image without a path is named by its file and row, which decides its order.

    A row is reached by reading its row group, of which the last few are kept: files whose rows are sorted by class are
    read once, others many times. Raises UserError without pyarrow, DataError and IntegrityError."""

    kind = "parquet"

    @classmethod
    def claims(cls, data: str) -> bool:
        return data.endswith(".parquet") and not os.path.isdir(data)

    def __init__(self, data: str | Path):
        arrow = _pyarrow()
        self.files, self.name = matching(str(data)), natural_name(str(data))
        names: list[str] = []
        paths, labels, places = [], [], []
        for number, path in enumerate(self.files):
            with _opened(path) as file:
                names = names or _class_names(file.schema_arrow)
                row = 0
                for group in range(file.num_row_groups):
                    table = _group(path, file, group, ["image", "label"])
                    image = table.column("image").combine_chunks()
                    sizes = arrow.compute.binary_length(image.field("bytes")).to_pylist()
                    if None in sizes or table.column("label").null_count:
                        raise IntegrityError(
                            f"{path} has a row without bytes or label in row group {group}; complete it"
                        )
                    for name, size in zip(image.field("path").to_pylist(), sizes, strict=True):
                        paths.append(Path(name).name if name else f"{number:05d}-{row:08d}")
                        places.append((number, row, size))
                        row += 1
                    labels += table.column("label").to_pylist()
        class_names = names_of_numbers(self.files[0].parent, labels, names)
        keys = [f"{class_names[label]}/{name}" for label, name in zip(labels, paths, strict=True)]
        self._set(keys, labels, np.array(places, dtype=np.int64), class_names)

    def content(self, file: int, place: int, size: int) -> bytes:
        first = 0
        images: Any = None
        for group, rows in enumerate(_rows_of_groups(self.files[file])):
            if place < first + rows:
                images = _images(self.files[file], group)
                break
            first += rows
        return images[place - first].as_py()


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow; pip install 'mutor-vision[parquet]'") from None
    return pyarrow


def _opened(path: Path):
    arrow = _pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise IntegrityError(f"{path} is no complete parquet file ({short(error, 120)}); copy it again") from None
    image = file.schema_arrow.field("image").type if "image" in file.schema_arrow.names else None
    fields = {field.name for field in image} if isinstance(image, arrow.StructType) else set()
    if not {"bytes", "path"} <= fields or "label" not in file.schema_arrow.names:
        raise DataError(f"{path} has the columns {', '.join(map(printable, file.schema_arrow.names))}; expected image "
                        "(with bytes and path) and label")  # fmt: skip
    return file


def _group(path: Path, file, group: int, columns: list[str]):
    arrow = _pyarrow()
    try:
        return file.read_row_group(group, columns=columns)
    except (arrow.ArrowException, OSError) as error:
        raise IntegrityError(f"{path} is damaged in row group {group} ({short(error, 120)}); copy it again") from None


@functools.lru_cache(maxsize=256)
def _rows_of_groups(path: Path) -> list[int]:
    with _opened(path) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


@functools.lru_cache(maxsize=4)
def _images(path: Path, group: int):
    """The bytes of a row group's images."""
    with _opened(path) as file:
        return _group(path, file, group, ["image"]).column("image").combine_chunks().field("bytes")


def _class_names(schema) -> list[str]:
    """Names in the description that Hugging Face's datasets write into a file; [] without one."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return list(map(str, told["info"]["features"]["label"]["names"]))
    except (KeyError, ValueError, TypeError):
        return []
