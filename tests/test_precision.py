"""Contexts that choose CUDA's kernels: they nest, in any order, and restore what was."""

import itertools

import pytest
import torch

from mutor_vision.runtime import Runtime, exact_float32, fixed_convolutions
from mutor_vision.tokenizer.encode import _encode
from mutor_vision.tokenizer.model import load_tokenizer

ALONE = Runtime(0, 1, torch.device("cpu"), None)


def state() -> tuple:
    cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.conv.fp32_precision, product.fp32_precision, cudnn.benchmark, cudnn.deterministic


@pytest.mark.parametrize("outer, inner", list(itertools.product((exact_float32, fixed_convolutions), repeat=2)))
def test_contexts_nest_and_restore(outer, inner):
    before = state()
    with outer():
        within = state()
        with inner():
            if exact_float32 in (outer, inner):
                assert state()[:2] == ("ieee", "ieee")
            if fixed_convolutions in (outer, inner):
                assert state()[2:] == (False, True)
        assert state() == within
        with pytest.raises(KeyError), inner():
            raise KeyError
        assert state() == within
    assert state() == before


def test_the_contexts_of_encoding_and_evaluation_nest(tiny_tokenizer_path):
    """They used torch's two switches for TF32, one of which raises after the other."""
    tokenizer = load_tokenizer(tiny_tokenizer_path, ALONE.device)
    crops = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), exact_float32():
        within = _encode(tokenizer, crops, "float32", ALONE)
    with torch.no_grad():
        assert torch.equal(within, _encode(tokenizer, crops, "float32", ALONE))
