"""LlamaGen's published checkpoints (github.com/FoundationVision/LlamaGen, tokenizer_image/vq_model.py), by name."""

import re

from torch import Tensor

from mutor_vision.config import TokenizerConfig
from mutor_vision.errors import MismatchError

_TOKENIZER_NAMES = (
    (r"^encoder\.conv_blocks\.", "encoder.down_blocks."),
    (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.1\.", ".mid_block.attentions.0."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
    (r"\.res\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
)
_ATTENTION_MATRIX = re.compile(r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")


def tokenizer_state_dict(llamagen_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of LlamaGen's VQ model (the 'model' entry of vq_ds16_c2i.pt) -> state dict of our VQTokenizer.

    Attention's 1x1 convolutions become matrices, and the usage ring buffer, which is no weight, is left out."""
    ours = {}
    for name, value in llamagen_state.items():
        if name == "quantize.codebook_used":
            continue
        for pattern, replacement in _TOKENIZER_NAMES:
            name = re.sub(pattern, replacement, name)
        ours[name] = value.flatten(1) if _ATTENTION_MATRIX.search(name) else value
    return ours


def tokenizer_config(llamagen_state: dict[str, Tensor], image_size: int = 256) -> TokenizerConfig:
    """The sizes of LlamaGen's VQ model, read from the shapes in its state dict. image_size, in pixels, is not in the
    file. Raises MismatchError when it is not such a state dict."""
    blocks = sorted({int(m[1]) for name in llamagen_state if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.", name))})
    if not blocks or "quantize.embedding.weight" not in llamagen_state:
        raise MismatchError("not a LlamaGen VQ model: encoder.conv_blocks.* or quantize.embedding.weight is missing")
    channels = tuple(len(llamagen_state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"]) for i in blocks)
    layers = len({name.split(".")[4] for name in llamagen_state if name.startswith("encoder.conv_blocks.0.res.")})
    codebook_size, code_dim = llamagen_state["quantize.embedding.weight"].shape
    return TokenizerConfig(
        image_size=image_size,
        channels=channels,
        layers_per_block=layers,
        latent_channels=len(llamagen_state["encoder.conv_out.weight"]),
        code_dim=code_dim,
        codebook_size=codebook_size,
    )
