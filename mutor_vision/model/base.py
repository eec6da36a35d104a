"""The base of a fine-tuning run: any checkpoint of a transformer, ours or converted, that a new run starts from."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from mutor_vision.config import TrainConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import sha256

RECORD = "base.json"  # in the run directory: which weights it started from


@dataclasses.dataclass(frozen=True)
class Base:
    folder: Path  # the checkpoint
    config: TrainConfig
    weights: str  # 'ema' or 'model'

    @functools.cached_property
    def record(self) -> dict[str, str]:
        """What identifies these weights, for base.json."""
        return {
            "checkpoint": f"{self.folder.parent.parent.name}/{self.folder.name}",
            "weights": self.weights,
            "weights_sha256": sha256(self.folder / f"{self.weights}.safetensors"),
        }


def open_base(path: str | Path, weights: str = "best") -> Base:
    """A run, checkpoint or exported model -> Base. weights: 'model', 'ema', or 'best' (EMA where there is one)."""
    folder = checkpoint.resolve(path)
    config = checkpoint.read_config(folder, "transformer", TrainConfig)
    weights = checkpoint.weights_named(folder, weights)
    return Base(folder, config, weights)


def with_sizes_of_base(config: TrainConfig) -> TrainConfig:
    """config with the layers, heads, width and codebook of config.init; grid and classes are the token set's."""
    base = open_base(config.init).config.model
    names = ("layers", "heads", "dim", "vocab_size", "rope_base")
    model = dataclasses.replace(config.model, **{name: getattr(base, name) for name in names})
    return dataclasses.replace(config, model=model)


def load_base(model: Transformer, base: Base, say: Callable[[str], None]) -> None:
    """The base's weights into `model`. A register's row is added where there is none, and the class table stays
    `model`'s own, freshly initialised, where the number of classes is another. Raises MismatchError."""
    weights = checkpoint.read_weights(base.folder, base.weights)
    own = model.state_dict()
    tokens, classes = weights.get("token_embedding.weight"), weights.get("class_embedding.weight")
    say(f"starting from {base.folder} ({base.weights} weights)")
    if tokens is not None and len(tokens) == model.config.vocab_size:
        weights["token_embedding.weight"] = torch.cat([tokens, own["token_embedding.weight"][-1:].to(tokens)])
        say("a register's row is added to the token embedding, from N(0, 0.02)")
    if classes is not None and len(classes) != model.config.num_classes + 1:
        weights["class_embedding.weight"] = own["class_embedding.weight"]
        say(f"the class table is new, from N(0, 0.02): the base has {len(classes) - 1} classes, the token set "
            f"{model.config.num_classes}")  # fmt: skip
    if model.config.grid != base.config.model.grid:
        say(f"the base knows {base.config.model.grid} tokens, the token set has {model.config.grid}")
    checkpoint.load_strictly(model, weights, base.folder)
