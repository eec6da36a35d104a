"""Every setting, as frozen dataclasses: a unit and an off value on each field. The resolved configuration is written
beside the weights as JSON and is the only thing that later commands read.

A configuration refuses itself when it is made, whether from a file, from --set or by its constructor: values of another
type, values out of range, and values that contradict each other. What needs a token set or the number of processes is
checked by the training loops.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from mutor_vision.auxiliary_config import (
    AlignedStatesConfig,
    AuxiliaryConfig,
    EncoderStatesConfig,
    ParallelHeadsConfig,
    PrivateBlocksConfig,
    RegisterConfig,
)
from mutor_vision.errors import UserError
from mutor_vision.schedule import schedule_units
from mutor_vision.settings import Settings


@dataclass(frozen=True)
class TokenizerConfig(Settings):
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
    quantizer: str = "vq"  # of tokenizer.quantizer.QUANTIZERS; vq = the nearest of `codebook_size` learned vectors

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
        self._require("channels", bool, "whole numbers with commas")
        self._require_positive("image_size layers_per_block latent_channels code_dim norm_groups")
        self._require("codebook_size", lambda size: 2 <= size <= 2**32, "2 to 2^32, the most that token sets can hold")
        if odd := [channels for channels in self.channels if channels < 1 or channels % self.norm_groups]:
            raise UserError(f"model.channels has {odd[0]}, expected multiples of model.norm_groups {self.norm_groups}")
        if self.image_size % self.downsample:
            raise UserError(f"model.image_size is {self.image_size}, expected a multiple of {self.downsample} "
                            f"({len(self.channels)} levels of channels)")  # fmt: skip


@dataclass(frozen=True)
class TokenizerTrainConfig(Settings):
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
    perceptual_weight: float = 0.0  # needs `perceptual_network`; 0 = off
    perceptual_network: str = ""  # timm:NAME[@SIZE]: images resized to SIZE pixels, without it as they are
    perceptual_weights: str = ""  # a file under timm's names, package, or '' = timm's own
    perceptual_stages: tuple[int, ...] = (0, 1, 2, 3)  # of the network, that are compared; timm counts them from 0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0  # 0 = off
    adversarial_weight: float = 0.0  # 0 = no discriminator, LlamaGen: 0.5
    adversarial_start: int = 20_000  # optimizer step at which the discriminator begins
    discriminator_width: int = 64  # channels of its first layer
    discriminator_layers: int = 3  # that halve the image or widen; 3: patches of 70 pixels, 2: of 34
    quantize_after: int = 0  # optimizer step at which codes replace latents in the decoder, 0 = from the start
    dead_code_steps: int = 0  # re-seed a code unused for this many steps, 0 = off
    ema_decay: float = 0.999  # 0 = no EMA
    seed: int = 0
    precision: str = "auto"  # auto | float32 | bfloat16
    workers: int = 2  # image-reading processes per rank, 0 = in the main process
    skip_bad: int = 0  # images of `data` that cannot be used and are left out, at most; checkpoints list them
    verify: bool = False  # decode every image before the first step; otherwise headers are looked at
    log_every: int = 50  # steps, 0 = never
    val_every: int = 1000  # steps, 0 = never
    sample_every: int = 1000  # steps between grids of reconstructions, 0 = never
    save_every: int = 1000  # steps, 0 = only at the end
    keep: int = 2  # checkpoints kept, at least 2

    _absent_in = {
        1: {"val_images": 2000, "quantize_after": 0},
        2: {"model.quantizer": "vq"},
        3: {
            "perceptual_weight": 0.0, "perceptual_network": "", "perceptual_weights": "",
            "perceptual_stages": [0, 1, 2, 3], "discriminator_width": 64, "discriminator_layers": 3, "skip_bad": 0,
            "verify": False,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("steps batch_size lr")
        self._require_not_negative(
            "l1_weight l2_weight lpips_weight perceptual_weight codebook_weight commitment_weight entropy_weight clip "
            "adversarial_weight adversarial_start skip_bad workers dead_code_steps quantize_after warmup_steps "
            "val_images log_every val_every sample_every save_every"
        )
        self._require_betas()
        self._require("val_fraction", lambda share: 0 <= share <= 0.99, "0 to 0.99")
        self._require("min_crop_scale", lambda scale: 0.05 <= scale <= 1, "0.05 to 1")
        self._require("ema_decay", lambda decay: 0 <= decay <= 0.999999, "0 to 0.999999")
        self._require("keep", lambda keep: keep >= 2, "2 or more: the newest checkpoint may turn out damaged")
        self._require_seed()
        self._require_one_of("schedule", "constant", "cosine")
        self._require_one_of("precision", "auto", "float32", "bfloat16")
        self._require_positive("discriminator_width discriminator_layers")
        self._require("perceptual_stages", bool, "whole numbers with commas")
        if self.perceptual_network and not self.perceptual_network.startswith("timm:"):
            raise UserError(f"perceptual_network is '{self.perceptual_network}', expected timm:NAME or timm:NAME@SIZE")
        if self.perceptual_weight > 0 and not self.perceptual_network:
            raise UserError("perceptual_weight is above 0 and needs perceptual_network=timm:NAME")
        if self.adversarial_weight > 0 and self.model.image_size < 24:
            raise UserError(f"adversarial_weight needs 24 pixels or more, image_size is {self.model.image_size}")


@dataclass(frozen=True)
class TransformerConfig(Settings):
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

    @property
    def block_parameters(self) -> int:
        """Of the matrices of one block."""
        return 4 * self.dim**2 + 3 * self.dim * self.ffn_dim

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
class TrainConfig(Settings):
    """A transformer training run. Defaults: the paper's recipe (section B.2) on LlamaGen-B."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    registers: RegisterConfig = field(default_factory=RegisterConfig)
    parallel_heads: ParallelHeadsConfig = field(default_factory=ParallelHeadsConfig)
    private_blocks: PrivateBlocksConfig = field(default_factory=PrivateBlocksConfig)
    aligned_states: AlignedStatesConfig = field(default_factory=AlignedStatesConfig)
    encoder_states: EncoderStatesConfig = field(default_factory=EncoderStatesConfig)
    codes: str = ""  # token set made by tokenizers/encode.py
    val_codes: str = ""  # held-out token set; '' = hold out `val_fraction` of `codes`
    init: str = ""  # run or checkpoint to start from, which decides the model's sizes; '' = random weights
    lora_rank: int = 0  # with init: train an adapter of this rank and leave the rest alone, 0 = train everything
    lora_alpha: float = 16.0  # an adapter's output is scaled by lora_alpha / lora_rank
    lora_inputs: str = "all"  # where an adapter is active: all | registers (a drafter: the model stays as it is)
    val_fraction: float = 0.0  # share of images, 0 = train on all
    val_images: int = 10_000  # at most this many held-out images are scored
    steps: int = 360_000  # optimizer steps
    batch_size: int = 1024  # images per step over all processes
    epoch_images: int = 0  # images in an epoch, for weight schedules that count them; 0 = those of the token set
    micro_batch: int = 0  # images per forward pass and process, 0 = all; less = gradient accumulation
    activation_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more work
    parallel: str = "ddp"  # ddp = every process holds all weights | fsdp = each holds its share of every tensor
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05  # on matrices and embeddings, never on norms
    clip: float = 1.0  # gradient norm, 0 = off
    max_skipped: int = 3  # steps in a row whose gradients are not finite and which change nothing; more end the run
    schedule: str = "constant"  # constant | cosine
    warmup_steps: int = 0  # optimizer steps of linear warm-up, 0 = none
    min_lr: float = 0.0  # where cosine ends
    label_dropout: float = 0.1  # share of sequences that see the null class, 0 = no guidance at sampling
    ema_decay: float = 0.9999  # 0 = no EMA
    more_ema_decays: tuple[float, ...] = ()  # further averages, kept and validated beside it as ema-0.99 and so on
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

    _absent_in = {
        1: {
            "registers.weight_schedule": "constant", "parallel_heads.count": 1, "init": "", "lora_rank": 0,
            "lora_alpha": 16.0, "activation_checkpointing": False, "parallel": "ddp", "compile": "auto",
            "eval_every": 0, "eval_reference": "", "eval_features": "inception", "eval_weights": "",
            "eval_images": 5000,
        },
        2: {"parallel_heads.weight": 0.5, "parallel_heads.weight_schedule": "constant", "lora_inputs": "all"},
        3: {
            "max_skipped": 0, "epoch_images": 0, "registers.offsets": "",
            "private_blocks.weight": 0.0, "private_blocks.weight_schedule": "constant",
            "private_blocks.offsets": "below", "private_blocks.blocks": 2, "private_blocks.edge": "wrap",
            "aligned_states.weight": 0.0, "aligned_states.weight_schedule": "constant",
            "aligned_states.offsets": "same right below", "aligned_states.depth": 2 / 3,
            "aligned_states.projector_width": 0, "aligned_states.decay": 0.9999, "aligned_states.reduction": "sum",
            "aligned_states.edge": "wrap", "aligned_states.class_slot": True, "encoder_states.weight": 0.0,
            "encoder_states.weight_schedule": "constant", "encoder_states.offsets": "same",
            "encoder_states.depth": 2 / 3, "encoder_states.projector_width": 0, "encoder_states.reduction": "sum",
            "encoder_states.edge": "wrap", "encoder_states.network": "", "encoder_states.features_width": 0,
        },
        4: {"registers.max_offset_schedule": "constant"},
        5: {"more_ema_decays": []},
    }  # fmt: skip

    @property
    def ema_decays(self) -> dict[str, float]:
        """File stem in a checkpoint -> decay of each average of the weights, the one that is sampled first."""
        more = {f"ema-{decay}": decay for decay in self.more_ema_decays}
        return ({"ema": self.ema_decay} if self.ema_decay else {}) | more

    @property
    def auxiliaries(self) -> dict[str, AuxiliaryConfig]:
        """Field -> settings of each auxiliary loss, on or off, in the order of the fields."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, AuxiliaryConfig)}

    @property
    def reads_features(self) -> bool:
        """Whether a loss needs the token set's features."""
        return any(own.active and own.reads_features for own in self.auxiliaries.values())

    @property
    def schedule_units(self) -> set[str]:
        """Of what the losses that are on follow by the step: see schedule.schedule_units."""
        schedules = [each for own in self.auxiliaries.values() if own.active for each in own.schedules]
        return set().union(*map(schedule_units, schedules))

    @property
    def counts_epochs(self) -> bool:
        """Whether a loss's weight depends on the epoch."""
        return "e" in self.schedule_units

    @classmethod
    def _migrated(cls, given: dict[str, Any], format: int) -> dict[str, Any]:
        if format <= 2 and given.get("parallel_heads.count", 1) != 1:  # the registers' weight was the heads' then
            unused = RegisterConfig()
            for name in ("weight", "weight_schedule"):
                own = {f"registers.{name}": getattr(unused, name)}
                given = given | {f"parallel_heads.{name}": given.get(f"registers.{name}", getattr(unused, name))} | own
        return super()._migrated(given, format)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("steps batch_size lr lora_alpha sample_classes eval_images")
        self._require_not_negative(
            "max_skipped micro_batch lora_rank weight_decay clip warmup_steps min_lr val_images log_every val_every "
            "sample_every eval_every save_every epoch_images"
        )
        self._require_betas()
        self._require_share("label_dropout val_fraction ema_decay")
        decays = [self.ema_decay, *self.more_ema_decays]
        several = lambda more: not more or len({decay for decay in decays if 0 < decay < 1}) == len(decays)  # noqa: E731
        self._require("more_ema_decays", several, "decays above 0 and below 1, each once, beside an ema_decay above 0")
        self._require("keep", lambda keep: keep >= 2, "2 or more: the newest checkpoint may turn out damaged")
        self._require_seed()
        self._require_one_of("schedule", "constant", "cosine")
        self._require_one_of("precision", "auto", "float32", "bfloat16")
        self._require("sample_cfg_scale", lambda scale: 0 <= scale <= 1e6, "0 to 1e6")
        self._require_one_of("compile", "auto", "on", "off")
        self._require_one_of("parallel", "ddp", "fsdp")
        self._require_one_of("lora_inputs", "all", "registers")
        if self.schedule == "cosine" and self.min_lr > self.lr:
            raise UserError(f"min_lr is {self.min_lr:g}, expected at most lr, {self.lr:g}, where cosine begins")
        if self.lora_inputs == "registers" and not self.registers.active:
            raise UserError("lora_inputs is 'registers' and there are none; set registers.kind and registers.count")
        if self.parallel == "fsdp" and self.lora_rank:
            raise UserError("parallel is fsdp and lora_rank is set, which do not go together; an adapter has so little "
                            "to train that ddp will do: set parallel=ddp")  # fmt: skip
        if self.lora_rank and not self.init:
            raise UserError(f"lora_rank is {self.lora_rank} and init is ''; an adapter needs a model: --init RUN")
        on = {name: own for name, own in self.auxiliaries.items() if own.active}
        if self.lora_rank and (own := [name for name in on if on[name].has_weights]):
            raise UserError(f"{own[0]} has weights of its own and lora_rank is {self.lora_rank}; an adapter leaves the "
                            "rest of the model as it is: switch one of them off")  # fmt: skip
        if self.parallel_heads.active and not self.registers.active and self.registers.weight != RegisterConfig.weight:
            raise UserError(f"registers.weight is {self.registers.weight} and there are no registers; the weight of "
                            "parallel heads is parallel_heads.weight")  # fmt: skip
        shares = {f"{name}.weight": own.weight for name, own in on.items() if own.is_share}
        if sum(shares.values()) > 1:
            raise UserError(f"{' and '.join(shares)} are {' and '.join(map(str, shares.values()))}, expected at most 1 "
                            "together: the next token has the rest")  # fmt: skip
        if self.eval_every and not self.eval_reference:
            raise UserError("eval_every needs eval_reference, a file of statistics made by eval/reference.py")
