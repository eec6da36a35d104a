"""Every run of docs/first-grid.md, declared: what is trained, on what, for how long. run.py makes the runs and
results.py the page; neither knows a setting."""

from dataclasses import dataclass, replace

from mutor_vision.auxiliary_config import ParallelHeadsConfig, RegisterConfig
from mutor_vision.config import TokenizerConfig, TokenizerTrainConfig, TrainConfig, TransformerConfig

CLASSES = 20  # the first in sorted order
TEST_SAMPLES = 500  # images drawn for a Fréchet distance and a class accuracy
CFG_SCALE = 2.0  # guidance when drawing
TOKENIZER = TokenizerTrainConfig(
    model=TokenizerConfig(image_size=64, channels=(8, 16, 32, 64), layers_per_block=1, latent_channels=64, code_dim=8,
                          codebook_size=512, norm_groups=8, attention=False),
    steps=700, batch_size=16, lr=2e-3, schedule="cosine", warmup_steps=50, min_crop_scale=0.9, quantize_after=150,
    dead_code_steps=20, ema_decay=0.99, val_every=700, val_images=200, sample_every=0, save_every=100, workers=0,
)  # fmt: skip
FEATURE_EPOCHS = 8
FEATURE_SIZE = 32  # pixels: what the feature network sees of the 64

STEPS = 640  # of a run with registers or heads in the headline; the baseline goes on to twice as many
TRAINING = TrainConfig(
    model=TransformerConfig(4, 4, 96, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0), batch_size=16,
    lr=3e-3, steps=STEPS, warmup_steps=20, ema_decay=0.0, log_every=40, val_every=40, save_every=40, sample_every=0,
    keep=100, precision="float32",
)  # fmt: skip
MUTOR_2D = RegisterConfig("2d", 20)  # 20 registers over 64 slots, 31 %: the paper's best
METHODS = {
    "next-token": {},
    "MuToR-1D, 31 %": {"registers": RegisterConfig("1d", 20)},
    "MuToR-2D, 25 %": {"registers": RegisterConfig("2d", 16)},
    "MuToR-2D, 31 %": {"registers": MUTOR_2D},
    "MuToR-2D, 100 %": {"registers": RegisterConfig("2d", 64)},
    "2 parallel heads": {"parallel_heads": ParallelHeadsConfig(2)},
    "4 parallel heads": {"parallel_heads": ParallelHeadsConfig(4)},
}
ABLATIONS = {
    "offsets up to m = 2": replace(MUTOR_2D, max_offset=2),
    "loss weight a = 0.25": replace(MUTOR_2D, weight=0.25),
    "a falls from 0.5 to 0": replace(MUTOR_2D, weight_schedule="linear"),
    "an offset per register": replace(MUTOR_2D, offset_per="register"),
    "offsets up to m = 5": replace(MUTOR_2D, max_offset=5),
    "no loss across the edge": replace(MUTOR_2D, edge="ignore"),
    "no register at the class": replace(MUTOR_2D, class_slot=False),
    "8 registers (12.5 %)": replace(MUTOR_2D, count=8),
    "loss weight a = 0.75": replace(MUTOR_2D, weight=0.75),
    "offsets up to m = 3": replace(MUTOR_2D, max_offset=3),
}
PAIR = ("next-token", "MuToR-2D, 31 %")
SEEDS = (0, 1, 2)
# Steps of next-token and of MuToR-2D to the same compute: four and sixteen times the headline's.
LONG = {"long": (2560, 1960), "longest": (10240, 7840)}
SCARCE = {15: (640, 480), 50: (1280, 960)}  # images of a class -> steps of next-token, of MuToR-2D: equal compute


@dataclass(frozen=True)
class Run:
    """One training run and what is measured of it."""

    block: str  # headline | long | longest | regimes | ablations
    method: str
    config: TrainConfig  # codes and val_codes are filled in when it runs
    per_class: int = 0  # training images of a class, each seed its own; 0 = all
    also_score: tuple[int, ...] = ()  # steps whose checkpoints are scored beside the best and the last
    sampled: bool = True  # score the best and the last checkpoint; otherwise there are curves only
    drafts: bool = False  # measure every offset of its registers, or every head, on held-out images

    @property
    def name(self) -> str:
        dropout = self.config.model.ffn_dropout
        parts = [self.block, self.method, f"dropout {dropout}" if dropout else "",
                 f"{self.per_class} a class" if self.per_class else "", f"seed {self.config.seed}"]  # fmt: skip
        text = "-".join(part for part in parts if part).replace("%", "percent").replace("=", "")
        return "-".join(text.replace(",", "").split())


def headline(seeds: tuple[int, ...], *names: str) -> list[Run]:
    """Plentiful data. The baseline goes to twice the steps and is scored at the compute of its rivals."""
    return [
        Run("headline", name, replace(TRAINING, **METHODS[name], seed=seed, steps=STEPS * (1 if METHODS[name] else 2)),
            also_score=() if METHODS[name] else (STEPS, STEPS * 21 // 16), drafts=bool(METHODS[name]))
        for seed in seeds for name in names
    ]  # fmt: skip


def longer(block: str, seed: int) -> list[Run]:
    """Plentiful data and more training: does a difference last?"""
    every = max(TRAINING.val_every, LONG[block][0] // 64)
    return [
        Run(block, name, replace(TRAINING, **METHODS[name], seed=seed, steps=steps, val_every=every, save_every=every))
        for name, steps in zip(PAIR, LONG[block], strict=True)
    ]


def regimes(per_class: int, dropout: float, seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """Few images, many passes, to the same compute."""
    model = replace(TRAINING.model, token_dropout=dropout, residual_dropout=dropout, ffn_dropout=dropout)
    return [
        Run("regimes", name, replace(TRAINING, **METHODS[name], seed=seed, steps=steps, model=model), per_class)
        for seed in seeds for name, steps in zip(PAIR, SCARCE[per_class], strict=True)
    ]  # fmt: skip


def ablations(seeds: tuple[int, ...]) -> list[Run]:
    """One setting of MuToR-2D, 31 %, changed at a time, for half as long; the headline's runs are what they compare
    with, at the same step: the learning rate is constant."""
    return [
        Run("ablations", name, replace(TRAINING, registers=registers, seed=seed, steps=STEPS // 2), sampled=False)
        for name, registers in ABLATIONS.items() for seed in seeds
    ]  # fmt: skip


_FIRST = [name for name in METHODS if name != "MuToR-2D, 25 %"]
GRIDS: dict[str, list[Run]] = {  # in order of importance: a grid that is stopped early has the important runs
    "main": [
        *headline((0,), *METHODS), *headline((1, 2), *_FIRST), *regimes(15, 0.0), *regimes(15, 0.1),
        *ablations((0, 1)), *headline((1, 2), "MuToR-2D, 25 %"), *regimes(15, 0.3), *ablations((2,)),
        *longer("long", 0), *longer("long", 1), *longer("long", 2), *regimes(50, 0.0), *regimes(50, 0.1),
        *regimes(50, 0.3), *longer("longest", 0), *longer("longest", 1), *longer("longest", 2),
        *headline((3, 4), *METHODS),
    ],
    "small": headline((0, 1), *PAIR),
}  # fmt: skip
