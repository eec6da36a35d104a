"""Every setting, as frozen dataclasses: a unit and an off value on each field. The resolved configuration is written
beside the weights as JSON and is the only thing that later commands read.

A configuration refuses itself when it is made, whether from a file, from --set or by its constructor: values of another
type, values out of range, and values that contradict each other. What needs a token set or the number of processes is
checked by the training loops.
"""

import dataclasses
import difflib
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mutor_vision.errors import UserError

Config = TypeVar("Config")
FORMAT = 2  # of config.json; see _ABSENT_IN_FORMAT_1


class _Settings:
    """Base of every configuration: refuses values that are not of their field's type."""

    _prefix = ""  # what --set writes before the names of these fields

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            self._require(name, lambda value, hint=hint: _is_of(value, hint), _described(hint))

    def _require(self, names: str, holds: Callable[[Any], bool], expected: str) -> None:
        """Raise UserError for the first of the names, separated by blanks, whose value does not hold."""
        for name in names.split():
            if not holds(value := getattr(self, name)):
                raise UserError(f"{self._prefix}{name} is {_shown(value)}, expected {expected}")

    def _require_one_of(self, name: str, *choices: str) -> None:
        self._require(name, choices.__contains__, f"{', '.join(choices[:-1])} or {choices[-1]}")

    def _require_positive(self, names: str) -> None:
        self._require(names, lambda value: value > 0, "more than 0")

    def _require_not_negative(self, names: str) -> None:
        self._require(names, lambda value: value >= 0, "0 or more")

    def _require_share(self, names: str) -> None:
        self._require(names, lambda value: 0 <= value < 1, "at least 0 and below 1")

    def _require_betas(self) -> None:
        self._require("betas", lambda betas: all(0 <= beta < 1 for beta in betas), "two numbers of at least 0, below 1")


@dataclass(frozen=True)
class TokenizerConfig(_Settings):
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

    _prefix = "model."

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.channels) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) codes of an image of `image_size`."""
        side = self.image_size // self.downsample
        return side, side

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("image_size layers_per_block latent_channels code_dim codebook_size norm_groups")
        if odd := [channels for channels in self.channels if channels < 1 or channels % self.norm_groups]:
            raise UserError(f"model.channels has {odd[0]}, expected multiples of model.norm_groups {self.norm_groups}")
        if self.image_size % self.downsample:
            raise UserError(
                f"model.image_size is {self.image_size}, expected a multiple of {self.downsample} "
                f"({len(self.channels)} levels of channels)"
            )


@dataclass(frozen=True)
class TokenizerTrainConfig(_Settings):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("steps batch_size lr")
        self._require_not_negative(
            "l1_weight l2_weight lpips_weight codebook_weight commitment_weight entropy_weight adversarial_weight clip "
            "workers dead_code_steps quantize_after adversarial_start warmup_steps val_images log_every val_every "
            "sample_every save_every"
        )
        self._require_betas()
        self._require("val_fraction", lambda share: 0 <= share <= 0.99, "0 to 0.99")
        self._require("min_crop_scale", lambda scale: 0.05 <= scale <= 1, "0.05 to 1")
        self._require("ema_decay", lambda decay: 0 <= decay <= 0.999999, "0 to 0.999999")
        self._require("keep", lambda keep: keep >= 2, "2 or more: the newest checkpoint may turn out damaged")
        self._require_one_of("schedule", "constant", "cosine")
        self._require_one_of("precision", "auto", "float32", "bfloat16")
        if self.adversarial_weight > 0 and self.model.image_size < 24:
            raise UserError(f"adversarial_weight needs 24 pixels or more, image_size is {self.model.image_size}")


@dataclass(frozen=True)
class TransformerConfig(_Settings):
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

    _prefix = "model."

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
        super().__post_init__()
        self._require_positive("layers heads dim rope_base")
        self._require_not_negative("vocab_size num_classes")
        self._require("grid", lambda grid: min(grid) > 0 or grid == (0, 0), "two positive numbers, or 0,0")
        self._require_share("token_dropout residual_dropout ffn_dropout drop_path")
        if self.dim % self.heads or self.head_dim % 4:
            raise UserError(
                f"model.dim {self.dim} over model.heads {self.heads} is {self.dim / self.heads:g} a head, expected a "
                "multiple of 4 (2D rotary embedding)"
            )


@dataclass(frozen=True)
class RegisterConfig(_Settings):
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

    _prefix = "registers."

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("kind", "none", "1d", "2d")
        self._require_one_of("offset_per", "sequence", "register", "batch")
        self._require_one_of("edge", "wrap", "ignore")
        self._require_one_of("placement", "valid", "all")
        self._require_one_of("weight_schedule", "constant", "linear")
        if (self.kind == "none") != (self.count == 0):
            raise UserError(
                f"registers.kind is '{self.kind}' with registers.count {self.count}; "
                "use kind none with count 0, or kind 1d or 2d with a positive count"
            )
        if self.count < 0 or self.max_offset < 1:
            raise UserError(f"registers.count {self.count} and max_offset {self.max_offset} must not be negative or 0")
        self._require("weight", lambda weight: 0 <= weight <= 1, "0 to 1")
        if self.min_offset_w > self.max_offset or (self.kind != "2d" and self.min_offset_w != 1):
            raise UserError(
                f"registers.min_offset_w is {self.min_offset_w}; only 2d registers have it, at most max_offset"
            )
        if self.max_offset == 1 and self.kind == "2d" and self.min_offset_w == 1:
            raise UserError("registers.max_offset 1 leaves no 2d offset: (1, 1) is the token itself; use 2 or more")
        if self.max_offset == 1 and self.kind == "1d" and not self.next_token:
            raise UserError("registers.max_offset 1 with next_token off leaves no offset; use 2 or more")


@dataclass(frozen=True)
class TrainConfig(_Settings):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("steps batch_size lr parallel_heads lora_alpha sample_classes eval_images")
        self._require_not_negative(
            "micro_batch lora_rank weight_decay clip warmup_steps min_lr val_images log_every val_every sample_every "
            "eval_every save_every"
        )
        self._require_betas()
        self._require_share("label_dropout val_fraction ema_decay")
        self._require("keep", lambda keep: keep >= 2, "2 or more: the newest checkpoint may turn out damaged")
        self._require_one_of("schedule", "constant", "cosine")
        self._require_one_of("precision", "auto", "float32", "bfloat16")
        self._require_one_of("compile", "auto", "on", "off")
        self._require_one_of("parallel", "ddp", "fsdp")
        if self.parallel == "fsdp" and self.lora_rank:
            raise UserError("parallel is fsdp and lora_rank is set, which do not go together; an adapter has so little "
                            "to train that ddp will do: set parallel=ddp")  # fmt: skip
        if self.lora_rank and not self.init:
            raise UserError(f"lora_rank is {self.lora_rank} and init is ''; an adapter needs --init RUN to be trained "
                            "on")  # fmt: skip
        if self.parallel_heads > 1 and (self.registers.count or self.lora_rank or self.parallel == "fsdp"):
            raise UserError(f"parallel_heads is {self.parallel_heads}, expected 1 (none) with registers, lora_rank or "
                            "fsdp")  # fmt: skip
        if self.eval_every and not self.eval_reference:
            raise UserError("eval_every needs eval_reference, a file of statistics made by eval/reference.py")


# Files of format 1 were written while fields were still being added. What a file does not have was the value here when
# its weights were trained; a default that changes later must not change it. Format 2 has every field.
_ABSENT_IN_FORMAT_1: dict[type, dict[str, Any]] = {
    TokenizerTrainConfig: {"val_images": 2000, "quantize_after": 0},
    TrainConfig: {
        "registers.weight_schedule": "constant", "parallel_heads": 1, "init": "", "lora_rank": 0, "lora_alpha": 16.0,
        "activation_checkpointing": False, "parallel": "ddp", "compile": "auto", "eval_every": 0, "eval_reference": "",
        "eval_features": "inception", "eval_weights": "", "eval_images": 5000,
    },
}  # fmt: skip


def from_dict(kind: type[Config], values: Any, format: int = FORMAT) -> Config:
    """JSON object -> dataclass, strictly: unknown and missing fields are errors. format: of the file it comes from;
    what an older one did not have yet is filled in with what it meant then."""
    if not isinstance(values, dict):
        raise UserError(f"the settings are {_shown(values)}, expected an object with a value for each name")
    given, hints = _flat(values), _leaves(kind)
    for name in given:
        if name not in hints:
            raise UserError(f"unknown setting '{name}'; {_nearest(name, list(hints))}")
    if format == 1:
        given = _ABSENT_IN_FORMAT_1.get(kind, {}) | given
    if missing := [name for name in hints if name not in given]:
        raise UserError(f"setting '{missing[0]}' is missing ({len(missing)} of {len(hints)}); restore the file")
    return _build(kind, {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Dataclass -> JSON-ready dict; from_dict reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: Config, settings: list[str], **flags: Any) -> Config:
    """Apply 'name=value' strings, dotted for nested fields ('registers.count=80'), whose values are read by the field's
    type, and flags, each the value of the setting of its name, None = not given. All are applied at once, so that
    settings which belong together may come in any order; of two strings with one name the later counts.

    Raises UserError for an unknown name (naming the nearest), for a value of another type, and for a flag and a string
    that contradict each other."""
    values, hints, strings = _flat(dataclasses.asdict(config)), _leaves(type(config)), {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"setting '{setting}' has no '='; write --set name=value")
        if name not in hints:
            raise UserError(f"unknown setting '{name}'; {_nearest(name, list(hints))}")
        strings[name] = _parse(text, hints[name])
    flags = {name: value for name, value in flags.items() if value is not None}
    for name, value in flags.items():
        if strings.get(name, value) != value:
            raise UserError(f"--{name.replace('_', '-')} {value} and --set {name}={strings[name]} contradict each "
                            "other; give one of them")  # fmt: skip
    return _build(type(config), values | strings | flags)


def preset(presets: dict[str, Config], name: str) -> Config:
    """Look a preset up; the error names the nearest."""
    if name not in presets:
        raise UserError(f"unknown preset '{name}'; {_nearest(name, list(presets))}")
    return presets[name]


def differences(old: Any, new: Any) -> list[str]:
    """'name: old -> new' for every field in which two configurations of one type differ."""
    old_values, new_values = _flat(to_dict(old)), _flat(to_dict(new))
    return [f"{name}: {old_values[name]} -> {new_values[name]}" for name in old_values
            if old_values[name] != new_values[name]]  # fmt: skip


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _build(kind: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    """Dataclass of the values under dotted names, one for each."""
    return kind(**{
        name: _build(hint, values, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else values[prefix + name]
        for name, hint in _hints(kind).items()
    })  # fmt: skip


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Name -> type of each field."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _leaves(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field that holds a value, nested ones too."""
    found = {}
    for name, hint in _hints(kind).items():
        found |= _leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. A truth value is no number, a whole number is a float, nan is nothing."""
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, tuple) or not value:
            return False
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(kinds) == len(value) and all(map(_is_of, value, kinds))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        whole = "whole " if kinds[0] is int else ""
        return f"{whole}numbers with commas" + ("" if kinds[-1] is Ellipsis else f", {len(kinds)} of them")
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return words.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse(text: str, hint: Any) -> Any:
    """A --set value of the field's type, or the text itself where it is none, which the configuration then refuses."""
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_origin(hint) is tuple:
            return tuple(get_args(hint)[0](part) for part in text.strip("()[]").split(",") if part.strip())
        return hint(text)
    except (ValueError, KeyError):
        return text


def _nearest(name: str, names: list[str]) -> str:
    leaves = {n.rsplit(".", 1)[-1]: n for n in names}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(name, list(leaves), n=1, cutoff=0.5)]
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"
