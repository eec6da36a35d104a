import os
from pathlib import Path

import pytest
import torch

from mutor_vision.config import RegisterConfig, TransformerConfig

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that is not part of the project; tests that need it skip without it."""
    path = Path(os.environ.get("MUTOR_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"reference data not found at {path}; set MUTOR_SHARED")
    return path


@pytest.fixture
def tiny_config() -> TransformerConfig:
    """2 layers, 64 wide, 4x4 grid, 32 codes, 5 classes, no dropout."""
    return TransformerConfig(
        layers=2, heads=4, dim=64, vocab_size=32, num_classes=5, grid=(4, 4),
        token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,
    )  # fmt: skip


REGISTER_KINDS = {
    "1d": RegisterConfig("1d", 5),
    "1d, every slot": RegisterConfig("1d", 16),
    "2d": RegisterConfig("2d", 5),
    "2d, every slot": RegisterConfig("2d", 16),
    "2d, per register": RegisterConfig("2d", 7, offset_per="register"),
    "2d, per batch": RegisterConfig("2d", 7, offset_per="batch"),
    "2d, edge ignored": RegisterConfig("2d", 7, edge="ignore"),
    "2d, all slots drawn": RegisterConfig("2d", 7, placement="all"),
    "2d, below-left": RegisterConfig("2d", 7, max_offset=3, min_offset_w=-1),
    "2d, no next token": RegisterConfig("2d", 7, next_token=False),
    "2d, not at the class slot": RegisterConfig("2d", 7, class_slot=False),
    "2d, blind to itself": RegisterConfig("2d", 7, self_attention=False),
}


@pytest.fixture(params=REGISTER_KINDS.values(), ids=REGISTER_KINDS.keys())
def registers(request) -> RegisterConfig:
    return request.param


@pytest.fixture
def random_model(tiny_config):
    """A model whose head is not zero, so that its logits depend on its inputs."""
    from mutor_vision.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(tiny_config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model
