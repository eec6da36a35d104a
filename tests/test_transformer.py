import dataclasses
import math

import pytest
import torch
from timm.layers import SwiGLU

from mutor_vision.config import TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.model.attention import AttentionPattern, SplitAttention, causal_attention, dense_attention, rope_table
from mutor_vision.model.cache import KVCache, StaticStep
from mutor_vision.model.layers import Dropout, FeedForward, recomputed
from mutor_vision.model.transformer import Transformer, num_parameters

SLOTS = torch.arange(16)[None]


def inputs(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(32, (batch, 15), generator=generator), torch.randint(6, (batch,), generator=generator)


@pytest.mark.parametrize(
    "size, parameters",
    [
        ((12, 12, 768), 110_888_448),
        ((24, 16, 1024), 342_910_976),
        ((36, 20, 1280), 774_699_520),
        ((48, 24, 1536), 1_410_972_672),
        ((24, 32, 3200), 3_096_659_200),
    ],
    ids=["B", "L", "XL", "XXL", "3B"],
)
def test_parameter_counts_are_llamagens_plus_the_registers_row(size, parameters):
    layers, heads, dim = size
    config = TransformerConfig(layers, heads, dim, vocab_size=16384, num_classes=1000, grid=(16, 16))
    with torch.device("meta"):
        assert num_parameters(Transformer(config)) == parameters + dim


def test_the_first_loss_is_the_logarithm_of_the_vocabulary(tiny_config):
    logits = Transformer(tiny_config)(*inputs(), SLOTS)
    assert torch.nn.functional.cross_entropy(logits[0], torch.arange(16)).item() == pytest.approx(math.log(32))


def test_a_token_changes_only_the_outputs_that_may_see_it(random_model):
    tokens, labels = inputs()
    before = random_model(tokens, labels, SLOTS)
    tokens[:, 6] = (tokens[:, 6] + 1) % 32  # the token in slot 7
    changed = (random_model(tokens, labels, SLOTS) != before).any(-1).any(0)
    assert changed.tolist() == [False] * 7 + [True] * 9


def test_every_parameter_receives_a_gradient(random_model):
    tokens, labels = inputs()
    tokens[:, 3] = random_model.register_token
    random_model(tokens, labels, SLOTS).square().mean().backward()
    for name, parameter in random_model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_training_and_evaluation_mode_agree_without_dropout(random_model):
    tokens, labels = inputs()
    training = random_model.train()(tokens, labels, SLOTS)
    assert torch.equal(training, random_model.eval()(tokens, labels, SLOTS))


def test_dropout_acts_in_training_mode_only(tiny_config):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(tiny_config, token_dropout=0.5))
    torch.nn.init.normal_(model.head.weight)
    tokens, labels = inputs()
    reference = model.eval()(tokens, labels, SLOTS)
    assert torch.equal(reference, model(tokens, labels, SLOTS))
    assert not torch.equal(reference, model.train()(tokens, labels, SLOTS))


def test_dropout_drops_its_share_and_scales_the_rest_forward_and_backward():
    x = torch.ones(100, 1000, requires_grad=True)
    out = Dropout(0.3)(x)
    out.sum().backward()
    assert torch.equal(x.grad, out), "another mask in the backward pass"
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert out[out != 0].unique().tolist() == pytest.approx([1 / 0.7])


def test_the_feed_forward_keeps_less_than_timms_and_equals_it():
    ours, theirs = FeedForward(8, 24).double(), SwiGLU(8, 24, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    kept, gradients = {}, {}
    for module in (ours, theirs):
        sizes, module_x = kept.setdefault(module, []), x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            out = module(module_x)
        gradients[module] = torch.autograd.grad(out.square().sum(), (module_x, *module.parameters()))
    assert sum(kept[ours]) == sum(kept[theirs]) - 3 * 5 * 24, "as much as silu(gate) less"
    for mine, other in zip(gradients[ours], gradients[theirs], strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12)


def test_what_is_recomputed_keeps_its_inputs_only_and_has_the_same_gradients():
    norm, kept = torch.nn.RMSNorm(8).double(), []
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = recomputed(norm, x)
    assert kept == [x.numel()]
    expected = torch.autograd.grad(norm(x).square().sum(), (x, norm.weight))
    for mine, other in zip(torch.autograd.grad(out.square().sum(), (x, norm.weight)), expected, strict=True):
        assert torch.equal(mine, other)


def test_the_class_row_of_the_rotary_table_is_zero_and_the_rest_rotates():
    sin, cos = rope_table((3, 5), 16, 10000.0)
    assert sin.shape == (16, 16) and (sin[0] == 0).all() and (cos[0] == 0).all()
    assert torch.allclose(sin[1:] ** 2 + cos[1:] ** 2, torch.ones(15, 16))


def test_rotary_angles_are_row_in_the_first_half_and_column_in_the_second():
    """Against the formula: frequency i of an axis is base ** (-2 i / half), each angle twice in a row."""
    sin, _ = rope_table((3, 5), 16, 10000.0)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    for cell in range(15):
        row, column = divmod(cell, 5)
        angles = torch.cat([row * frequencies, column * frequencies]).repeat_interleave(2)
        assert torch.allclose(sin[cell + 1], angles.sin(), atol=1e-6)


def test_the_query_and_key_of_the_class_token_are_zero_vectors(random_model):
    """So every later query meets the class token with logit exactly 0 (LlamaGen's trap)."""
    seen = {}
    attention = random_model.blocks[0].attention

    def spy(q, k, v):
        seen.update(q=q, k=k)
        return causal_attention(q, k, v)

    x = torch.randn(1, 16, 64)
    sin, cos = random_model.rope[:, SLOTS][:, :, None]
    attention(x, sin, cos, spy)
    assert (seen["q"][:, :, 0] == 0).all() and (seen["k"][:, :, 0] == 0).all()
    assert (seen["k"][:, :, 1] != 0).any()


@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_registers", [1, 80, 256])
def test_split_attention_equals_the_dense_reference_in_values_and_gradients(
    num_registers, dtype, tolerance, sees_itself
):
    torch.manual_seed(0)
    n, r = 256, num_registers
    slots = torch.stack([torch.randperm(n)[:r].sort().values for _ in range(2)])
    pattern = AttentionPattern(n, slots, sees_itself)
    tensors = [torch.randn(2, 3, n + r, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 3, n + r, 8, dtype=dtype)
    reference = dense_attention(*tensors, pattern.dense_mask())
    expected = torch.autograd.grad(reference, tensors, upstream)
    output = SplitAttention(pattern, tensors[0].dtype)(*tensors)
    assert torch.allclose(output, reference, atol=tolerance)
    for got, want in zip(torch.autograd.grad(output, tensors, upstream), expected, strict=True):
        assert torch.allclose(got, want, atol=tolerance, rtol=tolerance)


def test_split_attention_in_bfloat16_is_as_near_as_the_reference_in_bfloat16():
    torch.manual_seed(0)
    pattern = AttentionPattern(16, torch.stack([torch.randperm(16)[:5].sort().values for _ in range(2)]))
    exact = [torch.randn(2, 3, 21, 8).bfloat16().float().requires_grad_() for _ in range(3)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    output = SplitAttention(pattern, rounded[0].dtype)(*rounded)
    reference = dense_attention(*exact, pattern.dense_mask())
    assert output.dtype == torch.bfloat16 and torch.allclose(output.float(), reference, atol=0.03)
    gradients = torch.autograd.grad(output.float().square().sum(), rounded)
    for got, want in zip(gradients, torch.autograd.grad(reference.square().sum(), exact), strict=True):
        assert got.dtype == torch.bfloat16 and torch.allclose(got.float(), want, atol=0.2)


def test_the_dense_mask_by_hand():
    """Three causal inputs; registers at slots 0 and 2."""
    mask = AttentionPattern(3, torch.tensor([[0, 2]])).dense_mask()[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 1, 1, 0, 1],
    ]


@pytest.mark.parametrize("chunks", [[1] * 16, [16], [1, 5, 1, 9], [3, 13]])
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(random_model, chunks):
    tokens, labels = inputs()
    full = random_model(tokens, labels, SLOTS)
    cache = KVCache(random_model.config, 3, device=tokens.device, dtype=torch.float32)
    parts, start = [], 0
    for size in chunks:
        step_tokens = tokens[:, max(0, start - 1) : start + size - 1]
        step_labels = labels if start == 0 else None
        parts.append(random_model(step_tokens, step_labels, SLOTS[:, start : start + size], cache=cache))
        start += size
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-5)


@pytest.mark.parametrize("reach", [4, 16])
@torch.no_grad()
def test_static_steps_equal_the_full_forward(random_model, reach):
    tokens, labels = inputs()
    full = random_model(tokens, labels, SLOTS)
    cache = KVCache(random_model.config, 3, device=tokens.device, dtype=torch.float32)
    random_model(tokens[:, :0], labels, SLOTS[:, :1], cache=cache)
    for slot in range(1, 16):
        step = StaticStep(cache, torch.tensor([slot]), (slot // reach + 1) * reach)
        logits = random_model(tokens[:, slot - 1 : slot], None, SLOTS[:, slot : slot + 1], cache=step)
        assert torch.allclose(logits[:, 0], full[:, slot], atol=1e-5)


@torch.no_grad()
def test_a_cache_can_be_rolled_back(random_model):
    tokens, labels = inputs()
    cache = KVCache(random_model.config, 3, device=tokens.device, dtype=torch.float32)
    random_model(tokens[:, :4], labels, SLOTS[:, :5], cache=cache)
    first = random_model(tokens[:, 4:7], None, SLOTS[:, 5:8], cache=cache)
    random_model((tokens[:, :2] + 1) % 32, None, SLOTS[:, 8:10], cache=cache)
    cache.length = 5
    assert torch.equal(random_model(tokens[:, 4:7], None, SLOTS[:, 5:8], cache=cache), first)


def test_a_width_that_the_rotary_embedding_cannot_split_is_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        TransformerConfig(layers=1, heads=3, dim=64)


@pytest.mark.parametrize("name", ["token_dropout", "residual_dropout", "ffn_dropout", "drop_path"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_that_would_drop_everything_is_refused(name, rate):
    with pytest.raises(UserError, match=f"model.{name} is"):
        TransformerConfig(**{name: rate})
