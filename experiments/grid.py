"""Every run of docs/results.md, declared: what is trained, on what, for how long. run.py makes the runs and results.py
the page; neither knows a setting."""

from dataclasses import dataclass, replace

from mutor_vision.config import RegisterConfig, TokenizerConfig, TokenizerTrainConfig, TrainConfig, TransformerConfig

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
    "2 parallel heads": {"parallel_heads": 2},
    "4 parallel heads": {"parallel_heads": 4},
}
ABLATIONS = {
    "offsets up to m = 2": replace(MUTOR_2D, max_offset=2),
    "offsets up to m = 3": replace(MUTOR_2D, max_offset=3),
    "offsets up to m = 5": replace(MUTOR_2D, max_offset=5),
    "no loss across the edge": replace(MUTOR_2D, edge="ignore"),
    "an offset per register": replace(MUTOR_2D, offset_per="register"),
    "loss weight a = 0.25": replace(MUTOR_2D, weight=0.25),
    "loss weight a = 0.75": replace(MUTOR_2D, weight=0.75),
    "a falls from 0.5 to 0": replace(MUTOR_2D, weight_schedule="linear"),
    "no register at the class": replace(MUTOR_2D, class_slot=False),
    "8 registers (12.5 %)": replace(MUTOR_2D, count=8),
}
DROPOUTS = (0.0, 0.1, 0.3)
SCARCE = {15: (480, 360), 50: (640, 480)}  # images of a class -> steps of next-token, of MuToR-2D: equal compute


@dataclass(frozen=True)
class Run:
    """One training run and what is measured of it."""

    block: str  # headline | regimes | ablations
    method: str
    config: TrainConfig  # codes and val_codes are filled in when it runs
    per_class: int = 0  # training images of a class, each seed its own; 0 = all
    also_score: tuple[int, ...] = ()  # steps whose checkpoints are scored beside the best and the last
    drafts: bool = False  # measure every offset of its registers, or every head, on held-out images

    @property
    def name(self) -> str:
        dropout = self.config.model.ffn_dropout
        parts = [self.block, self.method, f"dropout {dropout}" if dropout else "",
                 f"{self.per_class} a class" if self.per_class else "", f"seed {self.config.seed}"]  # fmt: skip
        text = "-".join(part for part in parts if part).replace("%", "percent").replace("=", "")
        return "-".join(text.replace(",", "").split())


def headline(seeds: tuple[int, ...], methods: dict[str, dict] = METHODS) -> list[Run]:
    """Plentiful data. The baseline goes to twice the steps and is scored at the compute of its rivals."""
    return [
        Run("headline", method, replace(TRAINING, **settings, seed=seed, steps=STEPS if settings else 2 * STEPS),
            also_score=() if settings else (STEPS, STEPS * 21 // 16),
            drafts=bool(settings))
        for seed in seeds for method, settings in methods.items()
    ]  # fmt: skip


def regimes(seeds: tuple[int, ...]) -> list[Run]:
    """Few images, many passes: data x dropout x objective, to the same compute."""
    return [
        Run("regimes", method, replace(TRAINING, registers=registers, seed=seed, steps=steps, model=dropped(dropout)),
            per_class)
        for seed in seeds for per_class, both in SCARCE.items() for dropout in DROPOUTS
        for method, registers, steps in zip(("next-token", "MuToR-2D, 31 %"), (RegisterConfig(), MUTOR_2D), both,
                                            strict=True)
    ]  # fmt: skip


def ablations(seeds: tuple[int, ...]) -> list[Run]:
    """One setting of MuToR-2D, 31 %, changed at a time; the headline's runs are what they compare with."""
    return [
        Run("ablations", name, replace(TRAINING, registers=registers, seed=seed))
        for seed in seeds for name, registers in ABLATIONS.items()
    ]  # fmt: skip


def dropped(dropout: float) -> TransformerConfig:
    names = ("token_dropout", "residual_dropout", "ffn_dropout")
    return replace(TRAINING.model, **dict.fromkeys(names, dropout))


_SMALL = {name: METHODS[name] for name in ("next-token", "MuToR-2D, 31 %")}
GRIDS: dict[str, list[Run]] = {  # in order of importance: a grid that is stopped early has the important runs
    "main": headline((0, 1, 2)) + regimes((0, 1, 2)) + ablations((0, 1, 2)),
    "small": headline((0, 1), _SMALL),
}
