"""Every setting, as frozen dataclasses: a unit and an off value on each field. The resolved configuration is written
beside the weights as JSON and is the only thing that later commands read.

A configuration refuses itself when it is made, whether from a file, from --set or by its constructor: values of another
type, values out of range, and values that contradict each other. What needs a token set or the number of processes is
checked by the training loops.
"""

from dataclasses import dataclass, field

from mutor_vision.errors import UserError
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
        self._require_positive("image_size layers_per_block latent_channels code_dim codebook_size norm_groups")
        if odd := [channels for channels in self.channels if channels < 1 or channels % self.norm_groups]:
            raise UserError(f"model.channels has {odd[0]}, expected multiples of model.norm_groups {self.norm_groups}")
        if self.image_size % self.downsample:
            raise UserError(
                f"model.image_size is {self.image_size}, expected a multiple of {self.downsample} "
                f"({len(self.channels)} levels of channels)"
            )


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

    _absent_in = {1: {"val_images": 2000, "quantize_after": 0}, 2: {"model.quantizer": "vq"}}

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
class RegisterConfig(Settings):
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
class TrainConfig(Settings):
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

    _absent_in = {
        1: {
            "registers.weight_schedule": "constant", "parallel_heads": 1, "init": "", "lora_rank": 0,
            "lora_alpha": 16.0, "activation_checkpointing": False, "parallel": "ddp", "compile": "auto",
            "eval_every": 0, "eval_reference": "", "eval_features": "inception", "eval_weights": "",
            "eval_images": 5000,
        },
    }  # fmt: skip

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
