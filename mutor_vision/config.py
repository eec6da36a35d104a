"""Every setting, as frozen dataclasses: a unit and an off value on each field. The resolved configuration is written
beside the weights as JSON and is the only thing that later commands read."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from mutor_vision.errors import UserError

Config = TypeVar("Config")


@dataclass(frozen=True)
class TokenizerConfig:
    """VQ autoencoder. Defaults: LlamaGen's VQ-16 (arXiv 2406.06525)."""

    image_size: int = 256  # pixels, square; the size it is trained on
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)  # per level; each level but the last halves the image
    layers_per_block: int = 2  # residual blocks a level in the encoder; the decoder has one more
    latent_channels: int = 256  # width of the encoder's output
    code_dim: int = 8  # width of a codebook vector
    codebook_size: int = 16384  # number of codes, V
    attention: bool = True  # self-attention at the lowest resolution and in the middle
    norm_groups: int = 32  # GroupNorm groups; every channel count must be a multiple
    l2_norm: bool = True  # compare unit vectors (LlamaGen); False: plain vectors (taming-transformers)

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.channels) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) codes of an image of `image_size`."""
        side = self.image_size // self.downsample
        return side, side


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """A tokenizer training run. Defaults: LlamaGen's recipe for VQ-16."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: str = ""  # folder with one sub-folder of images per class
    val_data: str = ""  # the same, held out; '' = hold out `val_fraction` of `data`
    val_fraction: float = 0.02  # share of images, 0 = no validation
    val_images: int = 2000  # at most this many held-out images are scored
    steps: int = 400_000  # optimizer steps
    batch_size: int = 128  # images per step over all processes
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: str = "constant"  # constant | cosine (to 0 at `steps`)
    warmup_steps: int = 0  # optimizer steps of linear warm-up, 0 = none
    clip: float = 1.0  # gradient norm, 0 = off
    min_crop_scale: float = 0.8  # random crops cover at least this share of the short side, 1 = centre crop only
    l1_weight: float = 0.0
    l2_weight: float = 1.0
    lpips_weight: float = 0.0  # needs `lpips_weights`; 0 = off, LlamaGen: 1
    lpips_weights: str = ""  # file of VGG16 and linear-head weights, see tokenizer/losses.py
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0  # 0 = off
    adversarial_weight: float = 0.0  # 0 = no discriminator, LlamaGen: 0.5
    adversarial_start: int = 20_000  # optimizer step at which the discriminator begins
    quantize_after: int = 0  # optimizer step at which codes replace latents in the decoder, 0 = from the start
    dead_code_steps: int = 0  # re-seed a code unused for this many steps, 0 = off
    ema_decay: float = 0.999  # 0 = no EMA
    seed: int = 0
    precision: str = "auto"  # auto | float32 | bfloat16
    workers: int = 2  # image-reading processes per rank, 0 = in the main process
    log_every: int = 50  # steps, 0 = never
    val_every: int = 1000  # steps, 0 = never
    sample_every: int = 1000  # steps between grids of reconstructions, 0 = never
    save_every: int = 1000  # steps, 0 = only at the end
    keep: int = 2  # checkpoints kept, at least 2


@dataclass(frozen=True)
class TransformerConfig:
    """LlamaGen's class-conditional transformer. vocab_size, num_classes and grid of 0 are taken from the token set."""

    layers: int = 12
    heads: int = 12
    dim: int = 768
    vocab_size: int = 0  # codebook size V
    num_classes: int = 0  # the null class of guidance is id num_classes
    grid: tuple[int, int] = (0, 0)  # (h, w) codes
    token_dropout: float = 0.1  # on the embedded inputs
    residual_dropout: float = 0.1  # after attention's output projection
    ffn_dropout: float = 0.1  # after the feed-forward's output projection
    drop_path: float = 0.0  # stochastic depth of the last layer, rising linearly from 0
    rope_base: float = 10000.0

    @property
    def num_tokens(self) -> int:
        """N = h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def ffn_dim(self) -> int:
        """8/3 of the width rounded up to a multiple of 256, as LlamaGen does."""
        return -(-int(8 * self.dim / 3) // 256) * 256

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 4:
            raise UserError(
                f"model.dim {self.dim} over model.heads {self.heads} is {self.dim / self.heads:g} a head, expected a "
                "multiple of 4 (2D rotary embedding)"
            )
        for name in ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}, expected at least 0 and below 1")


@dataclass(frozen=True)
class RegisterConfig:
    """MuToR's registers (arXiv 2505.10518, sections 3.2 and 3.4). Defaults: the paper's best, where it says; each
    question that the paper leaves open is one field here."""

    kind: str = "none"  # none (next-token baseline) | 1d | 2d
    count: int = 0  # registers per image; h * w = one at every slot
    max_offset: int = 4  # 1d: d in 1..max_offset; 2d: d_h and d_w in 1..max_offset
    min_offset_w: int = 1  # 2d: smallest d_w; 1 = the paper's quadrant, down to -3 adds neighbours below-left
    weight: float = 0.5  # a in (1 - a) L_next + a L_reg
    weight_schedule: str = "constant"  # constant | linear (from `weight` to 0 at the last step)
    offset_per: str = "sequence"  # draw an offset per sequence | register | batch
    edge: str = "wrap"  # a target across the grid's edge: wrap = raster order, ignore = no loss
    placement: str = "valid"  # slots drawn: valid = those with a target | all (those without get no loss)
    next_token: bool = True  # keep offset 1, which repeats next-token prediction
    class_slot: bool = True  # a register may sit at the class token
    self_attention: bool = True  # a register sees itself

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kind", self.kind, ("none", "1d", "2d")),
            ("offset_per", self.offset_per, ("sequence", "register", "batch")),
            ("edge", self.edge, ("wrap", "ignore")),
            ("placement", self.placement, ("valid", "all")),
            ("weight_schedule", self.weight_schedule, ("constant", "linear")),
        ):
            if value not in choices:
                raise UserError(f"registers.{name} is '{value}', expected one of {', '.join(choices)}")
        if (self.kind == "none") != (self.count == 0):
            raise UserError(
                f"registers.kind is '{self.kind}' with registers.count {self.count}; "
                "use kind none with count 0, or kind 1d or 2d with a positive count"
            )
        if self.count < 0 or self.max_offset < 1:
            raise UserError(f"registers.count {self.count} and max_offset {self.max_offset} must not be negative or 0")
        if not 0 <= self.weight <= 1:
            raise UserError(f"registers.weight is {self.weight}, expected 0 to 1")
        if self.min_offset_w > self.max_offset or (self.kind != "2d" and self.min_offset_w != 1):
            raise UserError(
                f"registers.min_offset_w is {self.min_offset_w}; only 2d registers have it, at most max_offset"
            )
        if self.max_offset == 1 and self.kind == "2d" and self.min_offset_w == 1:
            raise UserError("registers.max_offset 1 leaves no 2d offset: (1, 1) is the token itself; use 2 or more")
        if self.max_offset == 1 and self.kind == "1d" and not self.next_token:
            raise UserError("registers.max_offset 1 with next_token off leaves no offset; use 2 or more")


@dataclass(frozen=True)
class TrainConfig:
    """A transformer training run. Defaults: the paper's recipe (section B.2) on LlamaGen-B."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    registers: RegisterConfig = field(default_factory=RegisterConfig)
    parallel_heads: int = 1  # heads in all, the k-th predicts k tokens ahead; 1 = next-token only; no registers then
    codes: str = ""  # token set made by tokenizers/encode.py
    val_codes: str = ""  # held-out token set; '' = hold out `val_fraction` of `codes`
    init: str = ""  # run or checkpoint to start from, which decides the model's sizes; '' = random weights
    lora_rank: int = 0  # with init: train an adapter of this rank and leave the rest alone, 0 = train everything
    lora_alpha: float = 16.0  # an adapter's output is scaled by lora_alpha / lora_rank
    val_fraction: float = 0.0  # share of images, 0 = train on all
    val_images: int = 10_000  # at most this many held-out images are scored
    steps: int = 360_000  # optimizer steps
    batch_size: int = 1024  # images per step over all processes
    micro_batch: int = 0  # images per forward pass and process, 0 = all; less = gradient accumulation
    activation_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more work
    parallel: str = "ddp"  # ddp = every process holds all weights | fsdp = each holds its share of every tensor
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05  # on matrices and embeddings, never on norms
    clip: float = 1.0  # gradient norm, 0 = off
    schedule: str = "constant"  # constant | cosine
    warmup_steps: int = 0  # optimizer steps of linear warm-up, 0 = none
    min_lr: float = 0.0  # where cosine ends
    label_dropout: float = 0.1  # share of sequences that see the null class, 0 = no guidance at sampling
    ema_decay: float = 0.9999  # 0 = no EMA
    seed: int = 0
    precision: str = "auto"  # auto | float32 | bfloat16
    compile: str = "auto"  # torch.compile the blocks: auto (on CUDA; measured not to pay on a CPU) | on | off
    log_every: int = 100  # steps, 0 = never
    val_every: int = 5000  # steps, 0 = never
    sample_every: int = 5000  # steps between sample grids, 0 = never
    sample_classes: int = 8  # classes in a sample grid, spread over all
    sample_cfg_scale: float = 2.0  # guidance of sample grids
    eval_every: int = 0  # steps between Frechet distances of samples, 0 = never
    eval_reference: str = ""  # statistics to measure them from, made by eval/reference.py, or ADM's
    eval_features: str = "inception"  # as --features of eval/fid.py
    eval_weights: str = ""  # as --weights of eval/fid.py, '' = the extractor's own
    eval_images: int = 5000  # samples, the same seeds and labels every time
    save_every: int = 5000  # steps, 0 = only at the end
    keep: int = 2  # checkpoints kept, at least 2


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """JSON object -> dataclass, strictly: unknown and missing fields are errors."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise UserError(f"unknown setting '{name}'; {_nearest(name, list(known))}")
    hints = get_type_hints(kind)
    resolved = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        resolved[name] = value
    return kind(**resolved)


def to_dict(config: Any) -> dict[str, Any]:
    """Dataclass -> JSON-ready dict; from_dict reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: Config, settings: list[str]) -> Config:
    """Apply 'name=value' strings, dotted for nested fields ('registers.count=80'); values are read by the field's type.
    Raises UserError for an unknown name (naming the nearest) and for a value of another type."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"setting '{setting}' has no '='; write --set name=value")
        names = setting_names(config)
        if name not in names:
            raise UserError(f"unknown setting '{name}'; {_nearest(name, names)}")
        config = _replace(config, name.split("."), text, name)
    return config


def preset(presets: dict[str, Config], name: str) -> Config:
    """Look a preset up; the error names the nearest."""
    if name not in presets:
        raise UserError(f"unknown preset '{name}'; {_nearest(name, list(presets))}")
    return presets[name]


def setting_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of every field that `override` accepts."""
    names = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        names += setting_names(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else [prefix + f.name]
    return names


def differences(old: Any, new: Any) -> list[str]:
    """'name: old -> new' for every field in which two configurations of one type differ."""
    old_values, new_values = _flat(to_dict(old)), _flat(to_dict(new))
    return [f"{name}: {old_values[name]} -> {new_values[name]}" for name in old_values
            if old_values[name] != new_values[name]]  # fmt: skip


def check_positive(config: Any, *names: str) -> None:
    """Raise UserError for the first named field that is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{name} is {getattr(config, name)}, expected more than 0")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _replace(config: Any, path: list[str], text: str, name: str) -> Any:
    current = getattr(config, path[0])
    if len(path) > 1:
        value = _replace(current, path[1:], text, name)
    else:
        value = _parse(text, current, name)
    return dataclasses.replace(config, **{path[0]: value})


def _parse(text: str, current: Any, name: str) -> Any:
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float):
            value = float(text)
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError
            return value
        if isinstance(current, tuple):
            parts = tuple(type(current[0])(part) for part in text.strip("()[]").split(",") if part.strip())
            if not parts:
                raise ValueError
            return parts
        return text
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a finite number", tuple: "numbers with commas"}
        raise UserError(f"setting {name} is '{text}', expected {kind[type(current)]}") from None


def _nearest(name: str, names: list[str]) -> str:
    leaves = {n.rsplit(".", 1)[-1]: n for n in names}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(name, list(leaves), n=1, cutoff=0.5)]
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"
