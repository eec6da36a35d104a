"""What training reads: token sets, the base of a fine-tuning, and the configuration once both are known."""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from mutor_vision.config import TrainConfig
from mutor_vision.data.order import SampleOrder, split
from mutor_vision.data.token_set import TokenSet, read_facts
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.keyed_random import choose
from mutor_vision.model.base import Base, open_base, with_sizes_of_base
from mutor_vision.runtime import Runtime
from mutor_vision.schedule import check_warmup
from mutor_vision.settings import to_dict
from mutor_vision.tokenizer.model import tokenizer_identity


@dataclass(frozen=True)
class Inputs:
    config: TrainConfig  # with every size filled in
    base: Base | None  # whose weights training starts from
    token_set: TokenSet
    train_images: np.ndarray  # numbers of images in token_set
    order: SampleOrder  # of train_images
    val_set: TokenSet  # may be token_set
    val_images: np.ndarray  # numbers of images in val_set, the same for every seed; may be empty


def open_inputs(config: TrainConfig, runtime: Runtime) -> Inputs:
    """Open everything, and raise UserError for the first thing that cannot work, before anything expensive is built."""
    token_set = TokenSet.open(config.codes)
    check_tokenizer_of(token_set)
    config = resolve(config, token_set)
    val_set = TokenSet.open(config.val_codes) if config.val_codes else token_set
    train_images, held_out = split(token_set, 0.0 if config.val_codes else config.val_fraction)
    held_out = np.arange(val_set.num_images) if config.val_codes else held_out
    if not config.epoch_images and config.counts_epochs:
        config = dataclasses.replace(config, epoch_images=len(train_images))
    val_images = held_out[choose(0, "validation images", len(held_out), config.val_images)]
    base = open_base(config.init) if config.init else None
    files = {"codes": token_set.identity, "init": base and base.record, "eval_reference": "", "eval_weights": ""}
    files["val_codes"] = config.val_codes and val_set.identity
    runtime.check_same(to_dict(config) | files)  # the same files may be elsewhere on another machine
    check(config, token_set, val_set, len(train_images), runtime)
    if base:
        check_tokenizer(base, token_set)
        classes = base.config.model.num_classes
        if config.lora_inputs == "registers" and classes != config.model.num_classes:
            raise MismatchError(f"{config.init} has {classes} classes, the token set {config.model.num_classes}; a "
                                "drafter leaves the class table as it is: encode the classes of the base")  # fmt: skip
    return Inputs(config, base, token_set, train_images, SampleOrder(train_images, config.seed), val_set, val_images)


def resolve(config: TrainConfig, token_set: TokenSet) -> TrainConfig:
    """Fill what the base and the token set decide; raise MismatchError where they or the configuration differ."""
    if config.init:
        config = with_sizes_of_base(config)
    model = config.model
    for name, value in (
        ("vocab_size", token_set.codebook_size),
        ("num_classes", len(token_set.class_names)),
        ("grid", tuple(token_set.grid)),
    ):
        current = getattr(model, name)
        if current in (0, (0, 0)):
            model = dataclasses.replace(model, **cast(dict[str, Any], {name: value}))
        elif current != value:
            raise MismatchError(
                f"model.{name} is {current}, but the token set {config.codes} has {value}; "
                f"encode with another tokenizer or set model.{name}={value}"
            )
    features: dict[str, Any] = {name: own.of_features(token_set.features) for name, own in config.auxiliaries.items()}
    return dataclasses.replace(config, model=model, **features)


def check(config: TrainConfig, token_set: TokenSet, val_set: TokenSet, num_images: int, runtime: Runtime) -> None:
    """Raise UserError for the first setting that does not suit the token sets or the number of processes."""
    check_warmup(config.steps, config.warmup_steps)
    if config.lora_inputs == "registers" and not config.lora_rank:
        raise UserError("lora_inputs is 'registers', which trains an adapter alone; give --init RUN --set lora_rank=8")
    world = runtime.world_size
    if config.batch_size % world:
        raise UserError(f"batch_size {config.batch_size} cannot be split over {world} processes; use a multiple")
    if config.batch_size > num_images:
        raise UserError(f"batch_size is {config.batch_size}, but there are {num_images} training images; lower it")
    if config.micro_batch > config.batch_size // world:
        raise UserError(f"micro_batch is {config.micro_batch}, expected 0 to batch_size / processes")
    if val_set.tokenizer_identity != token_set.tokenizer_identity or val_set.class_names != token_set.class_names:
        raise MismatchError(
            f"{config.val_codes} and {config.codes} differ in tokenizer or classes; "
            "encode both with the same tokenizer and class folders"
        )


def check_tokenizer_of(token_set: TokenSet) -> None:
    """Raise MismatchError when a token set has the copy of a tokenizer that did not make its codes: the run would
    learn, and its samples could not be decoded."""
    if (found := tokenizer_identity(token_set.tokenizer_path)) != token_set.tokenizer_identity:
        raise MismatchError(
            f"{token_set.tokenizer_path} is tokenizer {found[:12]}, the codes beside it are those of "
            f"{token_set.tokenizer_identity[:12]}; restore it, or encode again"
        )


def check_tokenizer(base: Base, token_set: TokenSet) -> None:
    """Raise MismatchError when the base is known to have learnt the codes of another tokenizer."""
    for root in (base.folder, base.folder.parent.parent):
        if (root / "token_set.json").is_file():
            known = read_facts(root)["tokenizer_sha256"]
            if known and known != token_set.tokenizer_identity:
                raise MismatchError(
                    f"{base.folder} was trained on codes of tokenizer {known[:12]}, {token_set.path} holds those of "
                    f"{token_set.tokenizer_identity[:12]}; encode the images with the base's tokenizer"
                )


def keep_on_device(token_set: TokenSet, runtime: Runtime) -> None:
    """All codes on the GPU, where they take less than a quarter of its free memory."""
    free = torch.cuda.mem_get_info(runtime.device)[0] if runtime.device.type == "cuda" else 0
    if token_set.nbytes < free / 4:
        token_set.keep_on(runtime.device)
