import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mutor_vision.config import TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.model import fast_paths
from mutor_vision.model.prepare import PackedLinear, prepare
from mutor_vision.model.transformer import Transformer
from mutor_vision.sampling.draw import (
    SampleSettings,
    draw,
    exponentials,
    filtered_probabilities,
    guidance_scales,
    noise_keys,
)
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.static import StaticSteps

LABELS = torch.tensor([0, 3, 1, 4, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0])
INDICES = np.arange(16)


def sample(model, rows=slice(None), seed=0, decoder=None, **settings):
    return generate(model, LABELS[rows], SampleSettings(**settings), seed=seed, indices=INDICES[rows], decoder=decoder)


def greedy_by_full_forward(model, labels, cfg_scale):
    """Without a cache: one whole forward per token and stream."""
    tokens = torch.empty(len(labels), 0, dtype=torch.int64)
    for i in range(model.config.num_tokens):
        slots = torch.arange(i + 1)[None]
        conditional = model(tokens, labels, slots)[:, -1]
        unconditional = model(tokens, torch.full_like(labels, 5), slots)[:, -1]
        logits = unconditional + cfg_scale * (conditional - unconditional)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_greedy_generation_equals_full_forwards(random_model, cfg_scale):
    expected = greedy_by_full_forward(random_model, LABELS, cfg_scale)
    assert torch.equal(sample(random_model, cfg_scale=cfg_scale, temperature=0).flatten(1), expected)


def test_image_i_is_the_same_for_every_batch_size(random_model):
    together = sample(random_model, cfg_scale=2.0)
    for size in (1, 3):
        parts = [sample(random_model, slice(i, i + size), cfg_scale=2.0) for i in range(0, 16, size)]
        assert torch.equal(torch.cat(parts), together)


def test_the_seed_and_the_index_decide(random_model):
    assert torch.equal(sample(random_model), sample(random_model))
    assert not torch.equal(sample(random_model), sample(random_model, seed=1))
    same_label = generate(random_model, LABELS[[0, 0]], SampleSettings(), seed=0, indices=INDICES[:2])
    assert not torch.equal(same_label[0], same_label[1])


def test_guidance_one_equals_none(random_model):
    off = sample(random_model, cfg_scale=3.0, cfg_interval=(15, 16), temperature=0)[:, :3]
    assert torch.equal(sample(random_model, cfg_scale=1.0, temperature=0)[:, :3], off)
    assert guidance_scales(SampleSettings(cfg_scale=1.0), 16) == [1.0] * 16


def test_the_guided_stream_ends_with_the_interval(random_model):
    """After the interval only the class's stream is decoded; its tokens equal those of two full streams."""
    tokens = torch.empty(16, 0, dtype=torch.int64)
    for i in range(16):
        slots = torch.arange(i + 1)[None]
        conditional = random_model(tokens, LABELS, slots)[:, -1]
        unconditional = random_model(tokens, torch.full_like(LABELS, 5), slots)[:, -1]
        logits = unconditional + 3 * (conditional - unconditional) if 2 <= i < 7 else conditional
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    got = sample(random_model, cfg_scale=3.0, cfg_interval=(2, 7), temperature=0)
    assert torch.equal(got.flatten(1), tokens)


def test_guidance_schedules():
    linear = guidance_scales(SampleSettings(cfg_scale=3.0, cfg_schedule="linear"), 5)
    assert linear == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    cosine = guidance_scales(SampleSettings(cfg_scale=3.0, cfg_schedule="power-cosine", cfg_power=1.0), 4)
    assert cosine == pytest.approx([1.0, 1 + 2 * (1 - 0.5**0.5) / 2, 2.0, 1 + 2 * (1 + 0.5**0.5) / 2])
    assert guidance_scales(SampleSettings(cfg_scale=3.0, cfg_interval=(1, 3)), 4) == [1.0, 3.0, 3.0, 1.0]


def test_a_code_of_probability_zero_is_never_drawn():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).expand(20_000, -1)
    assert set(draw(probabilities, keys_of(20_000)).tolist()) == {1, 3}
    one = torch.nn.functional.one_hot(torch.arange(300) % 7, 7).float()
    assert torch.equal(draw(one, keys_of(300)), torch.arange(300) % 7)


def keys_of(count, seed=0):
    """Of `count` images and positions: neighbours, as in use."""
    return noise_keys(seed, np.arange(-(-count // 16)), 16).flatten(0, 1)[:count]


def p_value(drawn, probabilities):
    counts = drawn.bincount(minlength=len(probabilities)).numpy()
    return chisquare(counts, len(drawn) * probabilities.double().numpy() / probabilities.double().sum().item()).pvalue


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_draws_follow_the_probabilities(settings):
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).expand(100_000, -1)
    probabilities = filtered_probabilities(logits, SampleSettings(**settings))
    drawn, possible = draw(probabilities, keys_of(100_000)), probabilities[0] > 0
    assert possible[drawn].all()
    renumbered = (possible.cumsum(0) - 1)[drawn]
    assert p_value(renumbered, probabilities[0][possible]) > 1e-3
    assert p_value(renumbered, probabilities[0][possible].flip(0)) < 1e-9, "the test sees another law"


def test_many_codes_are_equally_likely_and_noise_is_independent():
    """Of codes, of positions, and of images."""
    drawn = draw(torch.full((1, 1000), 1e-3).expand(60_000, -1), keys_of(60_000))
    assert p_value(drawn, torch.full((1000,), 1e-3)) > 1e-3
    noise = exponentials(keys_of(64_000), 6).neg().exp().reshape(4000, 16 * 6).double()
    correlations = torch.corrcoef(noise.T)[*torch.triu_indices(96, 96, 1)] * 4000**0.5
    assert abs(correlations.std() - 1) < 0.05 and correlations.abs().max() < 5
    assert abs(torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]) < 0.01


def test_noise_is_what_integers_say():
    """The hash in Python's integers."""
    keys = noise_keys(3, np.array([5, 2**40]), 2)
    got = exponentials(keys.flatten(0, 1), 3)
    for (a, b), row in zip(keys.flatten(0, 1).tolist(), got, strict=True):
        for column, value in enumerate(row.tolist(), start=1):
            x = (column * (2**32 - 1640531527) + a) % 2**32
            x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
            x = ((x ^ x >> 15) + b) * 0x735A2D97 % 2**32
            x = (x ^ x >> 15) * 0x2C1B3C6D % 2**32
            x = (x ^ x >> 12) % 2**31
            assert value == pytest.approx(-math.log1p(-(x + 0.5) / 2**31), rel=1e-5)


def test_nearly_equal_distributions_draw_nearly_always_the_same_code():
    """At an overlap of 0.9; with one uniform number and the distribution function it would be the same code in 11 %."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2000, 4096, generator=generator).log().neg().softmax(-1)
    q = (p.log() + 0.25 * torch.randn(p.shape, generator=generator)).softmax(-1)
    overlap = torch.minimum(p, q).sum(-1).mean().item()
    same = (draw(p, keys_of(2000)) == draw(q, keys_of(2000))).double().mean().item()
    assert 0.85 < overlap < 0.95 and same > overlap - 0.1


def test_top_k_keeps_ties_and_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1]]).log()
    assert (filtered_probabilities(logits, SampleSettings(top_k=3)) > 0).tolist() == [[True] * 5]
    assert (filtered_probabilities(logits, SampleSettings(top_k=2)) > 0).sum() == 2
    kept = filtered_probabilities(logits, SampleSettings(top_p=0.5))
    assert torch.allclose(kept, torch.tensor([[4 / 7, 3 / 7, 0, 0, 0]]))
    assert torch.allclose(filtered_probabilities(logits, SampleSettings()), logits.softmax(-1))


def test_temperature_zero_is_the_limit_of_small_temperatures():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    cold = filtered_probabilities(logits, SampleSettings(temperature=1e-3))
    assert torch.allclose(filtered_probabilities(logits, SampleSettings(temperature=0)), cold, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        dict(cfg_scale=-1.0), dict(cfg_scale=float("nan")), dict(temperature=-1.0), dict(temperature=float("inf")),
        dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5), dict(cfg_schedule="cubic"), dict(cfg_interval=(5, 3)),
        dict(cfg_interval=(1,)), dict(cfg_power=0.0),
    ],
)  # fmt: skip
@pytest.mark.bad_input("settings")
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SampleSettings(**settings)


def test_top_k_beyond_the_codebook_is_refused(random_model):
    with pytest.raises(UserError, match="codebook's 32"):
        sample(random_model, top_k=33)


def test_settings_are_plain_values():
    assert dataclasses.asdict(SampleSettings())["cfg_interval"] == (0, 0)


@pytest.fixture
def short_reach(monkeypatch):
    """Four lengths of the cache within 16 tokens."""
    monkeypatch.setattr(StaticSteps, "REACH", 4)


KINDS = [
    dict(cfg_scale=2.0), dict(cfg_scale=1.0), dict(cfg_scale=3.0, cfg_interval=(2, 7)), dict(temperature=0),
    dict(cfg_schedule="linear", top_k=5, top_p=0.9),
]  # fmt: skip


def test_static_steps_draw_the_same_codes(random_model, short_reach):
    """One after another with one object, so that other settings, larger and smaller batches replace what it kept."""
    static = StaticSteps()
    for settings in KINDS:
        expected = sample(random_model, **settings)
        for size in (5, 16, 3):
            assert torch.equal(sample(random_model, slice(size), decoder=static, **settings), expected[:size])


def test_a_static_step_compiles_without_breaks(random_model):
    """fullgraph: a part that falls back to Python is an error. Inductor's own code is left out: it takes a minute."""
    got = sample(random_model, decoder=StaticSteps("aot_eager"), **KINDS[2])
    assert torch.equal(got, sample(random_model, **KINDS[2]))


@pytest.fixture
def wide_model():
    """As wide as matrix products with several kernels; weights of a size that makes logits of about 1."""
    torch.manual_seed(0)
    config = TransformerConfig(2, 4, 256, 128, 5, (4, 4), 0.0, 0.0, 0.0)
    model = Transformer(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.06)
    return model


def logits_of(model, rows=slice(None)):
    tokens = torch.randint(128, (9, 15), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 6
    return model(tokens[rows], labels[rows], torch.arange(16)[None])


def test_packed_matrices_give_the_same_logits(wide_model):
    expected = logits_of(wide_model)
    packed = prepare(wide_model, None)
    if not fast_paths.packed_products(torch.float32):
        pytest.skip("no packed products on this machine, or switched off")
    assert isinstance(packed.head, PackedLinear) and isinstance(packed.blocks[1].ffn.fc2, PackedLinear)
    assert expected.std() > 0.5 and torch.allclose(logits_of(packed), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_gives_a_row_the_same_bits_in_any_batch(dtype):
    if not fast_paths.packed_products(dtype):
        pytest.skip("no packed products on this machine, or switched off")
    generator = torch.Generator().manual_seed(0)
    packed = PackedLinear(torch.randn(768, 2048, generator=generator).to(dtype))
    x = torch.randn(37, 2048, generator=generator)
    for size in (1, 2, 3, 16, 33, 36):
        assert torch.equal(torch.cat([packed(part) for part in x.split(size)]), packed(x)), size
    assert packed(x.unflatten(0, (37, 1))).shape == (37, 1, 768)


def test_matrices_in_bfloat16_equal_autocast(wide_model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits_of(wide_model)
        found = logits_of(prepare(wide_model, torch.bfloat16))
        # But for roundings of bfloat16 that fall the other way in another kernel: float32 is 0.004 away.
        assert torch.allclose(found, expected, atol=3e-2) and (found - expected).std() < 1e-3


def test_int8_logits_are_near(wide_model):
    """Each matrix of a block is off by half of 1/127 of its row's largest weight at most, about 0.5 % of the output;
    after two blocks the logits keep to 5 % of their spread."""
    pytest.importorskip("torchao")
    expected = logits_of(wide_model)
    difference = logits_of(prepare(wide_model, None, "int8")) - expected
    assert 0 < difference.std() < 0.05 * expected.std()


def test_unknown_quantization_is_refused(wide_model):
    with pytest.raises(UserError, match="quantize is 'int3', expected one of none, int8"):
        prepare(wide_model, None, "int3")


def test_a_fast_path_is_tried_alike_wherever_it_is_first_needed():
    """Under autocast or without gradients the trial itself would fail, and plain torch be used from then on."""
    fast_paths._tried.cache_clear()
    expected = fast_paths.prefix_attention(), fast_paths.packed_products(torch.float32)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        fast_paths._tried.cache_clear()
        with context:
            assert (fast_paths.prefix_attention(), fast_paths.packed_products(torch.float32)) == expected
