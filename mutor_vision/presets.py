"""Named configurations. Each comment gives the command's hardware and the score published or measured with it."""

from dataclasses import replace
from typing import Any

from mutor_vision.config import (
    AlignedStatesConfig,
    EncoderStatesConfig,
    PrivateBlocksConfig,
    RegisterConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
    TransformerConfig,
)

_LLAMAGEN_LOSSES: dict[str, Any] = {
    "l2_weight": 1.0, "lpips_weight": 1.0, "adversarial_weight": 0.5, "adversarial_start": 20_000,
}  # fmt: skip

_PHOTOGRAPHS = TokenizerTrainConfig(
    model=TokenizerConfig(
        image_size=64, channels=(32, 64, 128), layers_per_block=2, latent_channels=128, codebook_size=4096,
        norm_groups=8, attention=False,
    ),
    steps=2000, batch_size=64, lr=1.5e-3, schedule="cosine", warmup_steps=100, min_crop_scale=0.95,
    quantize_after=400, dead_code_steps=20, perceptual_weight=1.0,
    perceptual_network="timm:tf_efficientnet_lite0@128", perceptual_weights="package",
    val_every=500, sample_every=500, save_every=500,
)  # fmt: skip

TOKENIZERS: dict[str, TokenizerTrainConfig] = {
    # LlamaGen's VQ-16: 256 px, 16x16 codes. ImageNet, 8 A100-80G, 40 epochs of batch 128. Published: rFID 2.19,
    # usage 97 %. python/torchrun tokenizers/train_vq.py --preset vq-16 --set lpips_weights=FILE
    "vq-16": TokenizerTrainConfig(steps=400_000, **_LLAMAGEN_LOSSES),
    # LlamaGen's VQ-8: 256 px, 32x32 codes. The same recipe. Published: rFID 0.59.
    "vq-8": TokenizerTrainConfig(
        model=TokenizerConfig(channels=(128, 256, 256, 512)), steps=400_000, **_LLAMAGEN_LOSSES
    ),
    # 64 px, 16x16 codes of 4096. Ten classes of Tiny ImageNet, torchrun --nproc-per-node=2 on 2 CPU cores, 16 min:
    # 22.2 dB on held-out images, all codes used (docs/tiny-imagenet.md).
    "tiny-imagenet": TokenizerTrainConfig(
        model=TokenizerConfig(
            image_size=64, channels=(16, 32, 64), layers_per_block=1, latent_channels=64, codebook_size=4096,
            norm_groups=8, attention=False,
        ),
        steps=2000, batch_size=16, lr=2e-3, schedule="cosine", warmup_steps=100, min_crop_scale=0.95,
        quantize_after=400, dead_code_steps=20,
        val_every=500, sample_every=500, save_every=500,
    ),
    # 64 px, 8x8 codes of 4096: a quarter of the codes, coarser. The same command and time; not measured.
    "tiny-imagenet-8x8": TokenizerTrainConfig(
        model=TokenizerConfig(
            image_size=64, channels=(16, 32, 64, 64), layers_per_block=1, latent_channels=64, codebook_size=4096,
            norm_groups=8, attention=False,
        ),
        steps=2000, batch_size=16, lr=2e-3, schedule="cosine", warmup_steps=100, min_crop_scale=0.95,
        quantize_after=400, dead_code_steps=20,
        val_every=500, sample_every=500, save_every=500,
    ),
    # 64 px, 16x16 codes of 4096, with a perceptual loss whose weights are in a package (extra 'offline'). Of 17,440
    # images of 100 classes of Tiny ImageNet, stopped after 1,181 steps, 4 minutes of an H100 that it shared with eleven
    # others: a network that no loss has seen takes 94 % as many reconstructions for their class as originals; 22.2 dB.
    "photographs": _PHOTOGRAPHS,
    # 8x8 codes. The same after 1,132 steps: 75 %; 19.2 dB.
    "photographs-8x8": replace(_PHOTOGRAPHS, model=replace(_PHOTOGRAPHS.model, channels=(32, 64, 128, 128))),
    # 28 px, 7x7 codes of 64: scikit-learn's handwritten digits, for the demo.
    "digits": TokenizerTrainConfig(
        model=TokenizerConfig(
            image_size=28, channels=(16, 32, 32), layers_per_block=1, latent_channels=32, codebook_size=64,
            code_dim=8, norm_groups=8, attention=False,
        ),
        steps=200, batch_size=32, lr=2e-3, schedule="cosine", warmup_steps=50, min_crop_scale=1.0, val_every=200,
        sample_every=200,
    ),
}  # fmt: skip

# --- transformers ---------------------------------------------------------------------------------------------------
# NAME = data - size - objective. Sizes are LlamaGen's; parameters without the register's row, for 1000 classes and
# 16384 codes. 'mutor-2d' has a register at every slot of a 16x16 grid, 'mutor-2d-80' 80 at random slots (+31 % inputs).

_SIZES = {  #                    layers, heads, width      parameters
    "B": TransformerConfig(12, 12, 768),  #              110,888,448
    "L": TransformerConfig(24, 16, 1024),  #             342,910,976
    "XL": TransformerConfig(36, 20, 1280),  #            774,699,520
    "XXL": TransformerConfig(48, 24, 1536),  #         1,410,972,672
    "3B": TransformerConfig(24, 32, 3200),  #          3,096,659,200
}

_OBJECTIVES = {
    "next-token": RegisterConfig(),
    "mutor-1d": RegisterConfig("1d", 256),
    "mutor-2d": RegisterConfig("2d", 256),
    "mutor-2d-80": RegisterConfig("2d", 80),
}

# Other losses that look ahead, by their authors' code. They train with LlamaGen's recipe; published FID of size B after
# 300 epochs at cfg 2.0, second hand or from a README:
#   aligned-states    4.49   Mirai-E, K = 3
#   encoder-states    4.34   Mirai-I, DINOv2-B: mutor encode --features timm:vit_base_patch14_dinov2.lvd142m@224
#   private-blocks    4.50   MTAR, which has token contrast and token drop beside it
# None was run by this project. Mirai counts its schedule in epochs of 300; shorter trainings take the same shares.
_MIRAI_E = AlignedStatesConfig(2.0, "0:0,15e:1,80e:0.5")
_LOOKING_AHEAD: dict[str, dict[str, Any]] = {
    "aligned-states": {"aligned_states": _MIRAI_E},
    "encoder-states": {"encoder_states": EncoderStatesConfig(2.0)},
    "private-blocks": {"private_blocks": PrivateBlocksConfig(0.1)},
}
_LOOKING_AHEAD_SHORTLY: dict[str, dict[str, Any]] = _LOOKING_AHEAD | {
    "aligned-states": {"aligned_states": replace(_MIRAI_E, weight_schedule="0:0,5%:1,27%:0.5")}
}

# The paper's recipe (arXiv 2505.10518, B.2): batch 1024, constant lr 4e-4, 360,000 steps, centre crop and mirror image,
# 8 H100. Its scores for size B at cfg 2.0, 50,000 samples, ADM evaluator, one seed, FID / IS at 100K, 200K, 360K steps:
#   next-token    7.71 / 146.5   6.83 / 158.4   6.18 / 171.5
#   mutor-1d      7.01 / 155.6   6.43 / 163.0   5.79 / 178.3
#   mutor-2d      6.57 / 163.2   5.65 / 183.5   5.09 / 195.3
#   mutor-2d-80   6.87 / 162.1   5.89 / 175.6   5.03 / 195.6
# The paper trained size B only; the other sizes have no published score. None was run by this project.
_PAPER = TrainConfig()

# LlamaGen's recipe (ten-crop token sets, 300 epochs): batch 256 and lr 1e-4 for B and L, lr 2e-4 for XL, batch 512 and
# lr 2e-4 for XXL and 3B. Its scores, next-token: B 5.46 (cfg 2.0), L 3.80 (cfg 2.0). Chosen by the suffix '-llamagen'.
_LLAMAGEN = {
    size: replace(_PAPER, batch_size=batch, lr=lr, steps=300 * 1_281_167 // batch)
    for size, batch, lr in (
        ("B", 256, 1e-4),
        ("L", 256, 1e-4),
        ("XL", 256, 2e-4),
        ("XXL", 512, 2e-4),
        ("3B", 512, 2e-4),
    )
}


def _imagenet256() -> dict[str, TrainConfig]:
    presets = {}
    for size, model in _SIZES.items():
        model = replace(model, vocab_size=16384, num_classes=1000, grid=(16, 16))
        for objective, registers in _OBJECTIVES.items():
            name = f"imagenet256-{size}-{objective}"
            presets[name] = replace(_PAPER, model=model, registers=registers)
            presets[f"{name}-llamagen"] = replace(_LLAMAGEN[size], model=model, registers=registers)
        for objective, losses in _LOOKING_AHEAD.items():
            presets[f"imagenet256-{size}-{objective}-llamagen"] = replace(_LLAMAGEN[size], model=model, **losses)
    return presets


# One's own images with 16x16 tokens (256 pixels with vq-16, or 64 pixels with tiny-imagenet), from some thousands on;
# classes and codebook come from the token set. A few hours on one GPU; no score, since the data are yours.
_OWN = TrainConfig(
    model=TransformerConfig(8, 8, 512), batch_size=128, lr=4e-4, steps=50_000, warmup_steps=500, val_fraction=0.05,
    val_images=2000, ema_decay=0.9999, val_every=1000, sample_every=1000, save_every=1000,
)  # fmt: skip

# Tiny ImageNet at 64 pixels, 16x16 tokens, small enough for 2 CPU cores; figures in docs/tiny-imagenet.md.
_TINY = TrainConfig(
    model=TransformerConfig(6, 4, 256), batch_size=32, lr=6e-4, steps=400, warmup_steps=20, val_fraction=0.05,
    val_images=256, ema_decay=0.99, log_every=10, val_every=100, sample_every=200, save_every=100,
)  # fmt: skip

# A dozen classes of Tiny ImageNet at 64 pixels, 8x8 tokens of tiny-imagenet-8x8: experiments/pictures.py, hours on 2
# CPU cores. A register at 20 of the 64 slots is the paper's 31 %. Not trained to the end yet.
_PICTURES = TrainConfig(
    model=TransformerConfig(6, 4, 256), batch_size=32, lr=6e-4, steps=6000, warmup_steps=100, schedule="cosine",
    val_images=600, ema_decay=0.999, more_ema_decays=(0.99, 0.9995), log_every=50, val_every=500, sample_every=1000,
    save_every=500,
)  # fmt: skip
_PICTURES_OBJECTIVES = {"next-token": RegisterConfig(), "mutor-2d": RegisterConfig("2d", 20)}

# A hundred classes of Tiny ImageNet at 64 pixels, 16x16 tokens of photographs: the README's picture. 31.5 M parameters;
# both at once on one H100: next-token's 5,500 steps in 5.5 minutes, MuToR-2D's 4,334 in 6.3. Held-out next-token loss
# 6.34 nats, and 6.39 after 4,000 steps (docs/photographs.md).
_PHOTOGRAPH_MODELS = TrainConfig(
    model=TransformerConfig(8, 8, 512), batch_size=128, lr=8e-4, steps=5500, warmup_steps=300, schedule="cosine",
    val_images=1000, ema_decay=0.999, log_every=25, val_every=500, sample_every=1100, save_every=1375,
)  # fmt: skip
_PHOTOGRAPHS_OBJECTIVES = {"next-token": RegisterConfig(), "mutor-2d-80": RegisterConfig("2d", 80)}

# scikit-learn's digits at 28 pixels, 7x7 tokens: `make demo`, on 2 CPU cores. Figures in its report. No dropout: 22
# passes over the data do not overfit, and on a CPU it costs 40 % of the speed.
_DIGITS = TrainConfig(
    model=TransformerConfig(3, 4, 128, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0), batch_size=64,
    lr=1e-3, steps=500, warmup_steps=20, val_images=400, ema_decay=0.98, log_every=10, val_every=100, sample_every=0,
    save_every=100,
)  # fmt: skip
_DIGITS_OBJECTIVES = {
    "next-token": RegisterConfig(),
    "mutor-1d": RegisterConfig("1d", 49),
    "mutor-2d": RegisterConfig("2d", 49),
    "mutor-2d-15": RegisterConfig("2d", 15),
}

# A drafter for a finished model with 16x16 tokens, which stays as it is and draws the same images in fewer passes
# (docs/drafts.md): --init RUN --set lora_rank=8. Registers at every slot for the next token but one and but two; all of
# the loss is theirs.
_DRAFTER = TrainConfig(
    model=TransformerConfig(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0), lora_inputs="registers",
    registers=RegisterConfig("1d", 256, max_offset=3, next_token=False, offset_per="register", weight=1.0),
    batch_size=64, lr=1e-3, steps=2000, warmup_steps=50, schedule="cosine", weight_decay=0.0, ema_decay=0.999,
    val_fraction=0.05, val_images=256, log_every=50, val_every=500, sample_every=0, save_every=500,
)  # fmt: skip
_DRAFTERS = {
    "own-drafter": _DRAFTER,
    "digits-drafter": replace(
        _DRAFTER, registers=replace(_DRAFTER.registers, count=49), steps=500, val_fraction=0.0, val_images=400,
        ema_decay=0.98,
    ),
}  # fmt: skip

TRANSFORMERS: dict[str, TrainConfig] = (
    _imagenet256()
    | {f"own-{name}": replace(_OWN, registers=registers) for name, registers in _OBJECTIVES.items()}
    | {
        f"{data}-{name}": replace(base, **losses)
        for data, base in (("own", _OWN), ("tiny-imagenet", _TINY), ("digits", _DIGITS))
        for name, losses in _LOOKING_AHEAD_SHORTLY.items()
    }
    | {f"tiny-imagenet-{name}": replace(_TINY, registers=registers) for name, registers in _OBJECTIVES.items()}
    | {f"pictures-{name}": replace(_PICTURES, registers=registers) for name, registers in _PICTURES_OBJECTIVES.items()}
    | {
        f"photographs-{name}": replace(_PHOTOGRAPH_MODELS, registers=registers)
        for name, registers in _PHOTOGRAPHS_OBJECTIVES.items()
    }
    | {f"digits-{name}": replace(_DIGITS, registers=registers) for name, registers in _DIGITS_OBJECTIVES.items()}
    | _DRAFTERS
)
