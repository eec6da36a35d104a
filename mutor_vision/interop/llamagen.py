"""LlamaGen's published models (github.com/FoundationVision/LlamaGen) and taming-transformers' VQGAN, by name: what
their tensors are called, what ours are called, and the sizes that follow from the shapes. Pure functions of state
dicts."""

import re

import torch
from torch import Tensor

from mutor_vision.config import TokenizerConfig, TransformerConfig
from mutor_vision.errors import MismatchError, UserError

# The number of heads is in no tensor's shape. LlamaGen's sizes B, L, XL, XXL, 1B, XXXL, 3B and 7B by width.
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
SIZES = {768: "B", 1024: "L", 1280: "XL", 1536: "XXL", 2048: "1B", 2560: "XXXL", 3200: "3B", 4096: "7B"}

# (theirs, ours), replaced in this order in either direction.
_TRANSFORMER_NAMES = (
    ("cls_embedding.embedding_table.", "class_embedding."),
    ("tok_embeddings.", "token_embedding."),
    ("layers.", "blocks."),
    ("attention.wqkv.", "attention.qkv."),
    ("attention.wo.", "attention.out."),
    ("feed_forward.w1.", "ffn.fc1_g."),
    ("feed_forward.w3.", "ffn.fc1_x."),
    ("feed_forward.w2.", "ffn.fc2."),
    ("output.", "head."),
)
_TOKENIZER_NAMES = (
    ("encoder.conv_blocks.", "encoder.down_blocks."),
    ("decoder.conv_blocks.", "decoder.up_blocks."),
    (".mid.0.", ".mid_block.resnets.0."),
    (".mid.1.", ".mid_block.attentions.0."),
    (".mid.2.", ".mid_block.resnets.1."),
    (".res.", ".resnets."),
    (".attn.", ".attentions."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".norm_out.", ".conv_norm_out."),
    (".norm.", ".group_norm."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".proj_out.", ".to_out.0."),
    ("quantize.embedding.weight", "quantizer.codebook"),
)
_ATTENTION_MATRIX = re.compile(r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")
USAGE_BUFFER = "quantize.codebook_used"  # which codes the last 65536 latents chose: a statistic, no weight


def kind_of(names: set[str]) -> str:
    """'transformer', 'tokenizer' (LlamaGen's VQ model) or 'taming' (VQGAN) by tensor names. Raises MismatchError."""
    if "tok_embeddings.weight" in names:
        if any(name.startswith("cls_embedding.cap_proj.") for name in names):
            raise MismatchError("a text-conditional LlamaGen model; only class-conditional ones are supported")
        return "transformer"
    if "quantize.embedding.weight" in names and any(name.startswith("encoder.conv_blocks.") for name in names):
        return "tokenizer"
    if "quantize.embedding.weight" in names and any(name.startswith("encoder.down.") for name in names):
        return "taming"
    raise MismatchError(
        f"no LlamaGen transformer, LlamaGen VQ model or taming VQGAN: it holds {', '.join(sorted(names)[:3])} and "
        f"{max(0, len(names) - 3)} more"
    )


# --- the transformer ----------------------------------------------------------------------------------------------


def transformer_config(theirs: dict[str, Tensor], grid: tuple[int, int], heads: int = 0) -> TransformerConfig:
    """Sizes of a LlamaGen transformer from the shapes in its state dict. grid (h, w) tokens and, for a width that
    LlamaGen has not published, heads must be known from elsewhere. Raises UserError, MismatchError."""
    for name in ("cls_embedding.embedding_table.weight", "tok_embeddings.weight"):
        if name not in theirs or theirs[name].ndim != 2:
            raise MismatchError(f"no LlamaGen transformer: '{name}' is missing or is no matrix")
    vocab_size, dim = theirs["tok_embeddings.weight"].shape
    heads = heads or HEADS.get(dim, 0)
    if not heads:
        raise UserError(f"the model is {dim} wide, which is none of LlamaGen's sizes; give --heads, the shapes lack it")
    layers = [int(match[1]) for name in theirs if (match := re.match(r"layers\.(\d+)\.", name))]
    return TransformerConfig(
        layers=max(layers, default=-1) + 1,
        heads=heads,
        dim=dim,
        vocab_size=vocab_size,
        num_classes=len(theirs["cls_embedding.embedding_table.weight"]) - 1,
        grid=grid,
    )


def transformer_state_dict(theirs: dict[str, Tensor], register: Tensor) -> dict[str, Tensor]:
    """LlamaGen's state dict, or a part of it, -> ours, whose token embedding has one more row, register (C,). Shares
    the other tensors."""
    ours = {_rename(name, _TRANSFORMER_NAMES): value for name, value in theirs.items()}
    if (table := ours.get("token_embedding.weight")) is not None:
        ours["token_embedding.weight"] = torch.cat([table, register.to(table)[None]])
    return ours


def llamagen_transformer_state_dict(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> LlamaGen's, without the register's row. Shares the other tensors."""
    names = tuple((theirs, our) for our, theirs in _TRANSFORMER_NAMES)
    theirs = {_rename(name, names): value for name, value in ours.items()}
    theirs["tok_embeddings.weight"] = theirs["tok_embeddings.weight"][:-1].clone()
    return theirs


# --- the tokenizer ------------------------------------------------------------------------------------------------


def tokenizer_config(theirs: dict[str, Tensor], image_size: int = 256, l2_norm: bool = True) -> TokenizerConfig:
    """Sizes of LlamaGen's VQ model from the shapes in its state dict. image_size, in pixels, is not in the file;
    l2_norm False for taming's. Raises MismatchError when it is not such a state dict."""
    levels = sorted({int(m[1]) for name in theirs if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.", name))})
    needed = [f"encoder.conv_blocks.{i}.res.0.conv1.weight" for i in levels] + ["encoder.conv_out.weight"]
    needed.append("quantize.embedding.weight")
    for name in needed:
        if name not in theirs or theirs[name].ndim not in (2, 4):
            raise MismatchError(f"no LlamaGen VQ model: '{name}' is missing or of another shape")
    codebook_size, code_dim = theirs["quantize.embedding.weight"].shape
    return TokenizerConfig(
        image_size=image_size,
        channels=tuple(len(theirs[name]) for name in needed[:-2]),
        layers_per_block=len({n.split(".")[4] for n in theirs if n.startswith("encoder.conv_blocks.0.res.")}),
        latent_channels=len(theirs["encoder.conv_out.weight"]),
        code_dim=code_dim,
        codebook_size=codebook_size,
        attention=any(".attn." in name for name in theirs),
        l2_norm=l2_norm,
    )


def tokenizer_state_dict(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of LlamaGen's VQ model (the 'model' entry of vq_ds16_c2i.pt) -> state dict of our VQTokenizer.

    Attention's 1x1 convolutions become matrices, and the usage buffer, which is no weight, is left out."""
    ours = {}
    for name, value in theirs.items():
        if name != USAGE_BUFFER:
            name = _rename(name, _TOKENIZER_NAMES)
            ours[name] = value.flatten(1) if _ATTENTION_MATRIX.search(name) else value
    return ours


def llamagen_tokenizer_state_dict(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back, with an empty usage buffer, which LlamaGen's strict loading wants."""
    names = tuple((theirs, our) for our, theirs in _TOKENIZER_NAMES)
    theirs = {}
    for name, value in ours.items():
        matrix = _ATTENTION_MATRIX.search(name)
        theirs[_rename(name, names)] = value[:, :, None, None] if matrix else value
    return theirs | {USAGE_BUFFER: torch.zeros(65536, device=ours["quantizer.codebook"].device)}


def taming_state_dict(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """taming-transformers' VQGAN (taming/modules/diffusionmodules/model.py) -> LlamaGen's names for the same layers.
    taming counts the decoder's levels from the finest; its training losses, 'loss.*', are left out."""
    levels = {int(match[1]) for name in theirs if (match := re.match(r"decoder\.up\.(\d+)\.", name))}
    renamed = {}
    for name, value in theirs.items():
        if name.startswith("loss."):
            continue
        name = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", name)
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.conv_blocks.{max(levels) - int(m[1])}", name)
        name = name.replace(".mid.block_1.", ".mid.0.").replace(".mid.attn_1.", ".mid.1.")
        name = name.replace(".mid.block_2.", ".mid.2.").replace(".block.", ".res.")
        renamed[name] = value
    return renamed


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
