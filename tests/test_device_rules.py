"""A GPU's rules, checked without one: under fake tensors (shapes and devices, no numbers) the steady paths of training,
validation, encoding, scoring and decoding mix no devices, never wait for the device, and pin nothing but CPU memory.

Fake tensors claim to be on CUDA. They have no backward pass without it, since autograd asks CUDA itself for its
streams: where one is run, tensors are on torch's device `meta`, which has shapes and no numbers either, and to every
rule is a GPU. (Fake tensors on `meta` do have a backward pass, and crash the process now and then.)"""

import dataclasses
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mutor_vision.config import (
    AlignedStatesConfig,
    EncoderStatesConfig,
    ParallelHeadsConfig,
    PrivateBlocksConfig,
    RegisterConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
)
from mutor_vision.data.order import SampleOrder, read_batch
from mutor_vision.data.token_set import TokenSet
from mutor_vision.features import moments
from mutor_vision.features.extractors import TimmFeatures, create_small
from mutor_vision.model import lora
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.auxiliary import auxiliaries_of
from mutor_vision.objectives.objective import Objective
from mutor_vision.runtime import Runtime
from mutor_vision.sampling.decode import Plain, num_guided_tokens
from mutor_vision.sampling.draw import SampleSettings, guidance_scales
from mutor_vision.sampling.forecast import Forecast, forecast_step
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.static import StaticSteps
from mutor_vision.tokenizer import encode, losses
from mutor_vision.tokenizer.model import VQTokenizer
from mutor_vision.tokenizer.quantizer import count_codes, revive_dead_codes
from mutor_vision.training import sharding, validate
from mutor_vision.training.optim import build_optimizer
from mutor_vision.training.step import train_step, zero_sums

CUDA, META = torch.device("cuda", 0), torch.device("meta")
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique", "aten.bincount")


class BrokenRule(Exception):
    pass


class Rules(TorchDispatchMode):
    """Raises BrokenRule at what would make the host wait for a GPU, or fail on one."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        name = str(function)
        tensors = [tensor for value in arguments for tensor in _tensors(value)]
        on_gpu = [tensor for tensor in tensors if tensor.device.type in ("cuda", "meta")]
        if on_gpu and name.startswith(WAITS):
            raise BrokenRule(f"{name} waits for the device")
        if on_gpu and "pin_memory" in name:
            raise BrokenRule("pins memory of the GPU")
        target = named.get("device")
        if on_gpu and name.startswith("aten._to_copy") and target is not None and torch.device(target).type == "cpu":
            raise BrokenRule("copies to the CPU")
        if on_gpu and name.startswith("aten.copy_") and arguments[0].device.type == "cpu":
            raise BrokenRule("copies to the CPU")
        copies = name.startswith(("aten._to_copy", "aten.copy_"))
        if on_gpu and not copies and any(t.device.type == "cpu" and t.dim() for t in tensors):  # a scalar may be there
            raise BrokenRule(f"{name} mixes devices")
        return function(*arguments, **named)


@pytest.fixture
def on_fake_cuda(monkeypatch):
    """call(function): its result under the rules. Pinning, which fake tensors lack, is a check and no more."""

    def pin(tensor):
        if tensor.device.type != "cpu":
            raise BrokenRule("pins memory of the GPU")
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return partial(under_rules, partial(FakeTensorMode, allow_non_fake_inputs=True))


@pytest.fixture
def on_meta(monkeypatch):
    """The same for work with a backward pass on META. What torch has for real devices alone is answered for it:
    autocast is off, AdamW is not fused, and generators are the CPU's."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: adamw(*a, **k | {"fused": False}))
    monkeypatch.setattr(sharding, "set_found_inf", lambda optimizer, found: found + torch.zeros_like(found))
    monkeypatch.setattr(torch, "Generator", GeneratorOfCPU)  # timm's EMA makes one and draws nothing
    return partial(under_rules, nullcontext)


class GeneratorOfCPU(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


def under_rules(mode, function):
    try:
        with mode(), Rules():
            return function()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise BrokenRule(f"waits for the device: {error}") from None


def runtime_on(device) -> Runtime:
    return Runtime(rank=0, world_size=1, device=device, autocast_dtype=None)


def fake_model(config, device=CUDA) -> Transformer:
    with device:
        return Transformer(config)


def fake_set(device=CUDA) -> TokenSet:
    """A token set whose codes lie on the GPU."""
    found = object.__new__(TokenSet)
    found.grid, found.views, found.num_views, found.num_images = (4, 4), ["center"], 1, 60
    found.class_names, found.labels = list("abcde"), torch.zeros(60, dtype=torch.int64)
    found._resident = torch.zeros(60, 1, 16, dtype=torch.int16, device=device)
    return found


def read(token_set, device=CUDA):
    return read_batch(token_set, SampleOrder(np.arange(60), 0), step=0, batch_size=8, rank=0, world_size=1,
                      label_dropout=0.1, device=device)  # fmt: skip


def test_a_batch_of_codes_on_the_device_is_not_pinned(on_fake_cuda):
    batch = on_fake_cuda(lambda: read(fake_set()))
    assert batch.codes.device.type == batch.labels.device.type == "cuda" and batch.codes.shape == (8, 4, 4)


def test_the_loss_of_every_kind_of_registers_obeys_the_rules(on_fake_cuda, tiny_config, registers):
    def work():
        config = TrainConfig(model=tiny_config, registers=registers)
        batch, objective = read(fake_set()), Objective(fake_model(tiny_config), auxiliaries_of(config))
        with torch.no_grad():
            return objective(batch.labels, objective.sequence(batch.codes, seed=0, sample_index=np.arange(8)))

    assert all(term.device.type == "cuda" for term in on_fake_cuda(work).values())


DECODERS = {
    "plain": Plain, "static": lambda: StaticSteps(record=lambda step: step),
    "forecast": lambda: Forecast(4, 2, record=lambda step: step),
}  # fmt: skip


@pytest.mark.parametrize("decoder", ["plain", "static"])
def test_decoding_obeys_the_rules(on_fake_cuda, tiny_config, drawing, decoder):
    def work():
        steps = DECODERS[decoder]()
        labels = torch.zeros(3, dtype=torch.int64, device=CUDA)
        return generate(fake_model(tiny_config).eval(), labels, SampleSettings(**drawing), seed=0,
                        indices=np.arange(3), decoder=steps)  # fmt: skip

    assert on_fake_cuda(work).device.type == "cuda"


TRAININGS = {
    "next-token": {},
    "registers": {"registers": RegisterConfig("2d", 5)},
    "registers at every slot": {"registers": RegisterConfig("1d", 16)},
    "parallel heads": {"parallel_heads": ParallelHeadsConfig(3)},
    "private blocks": {"private_blocks": PrivateBlocksConfig(0.1, offsets="below 1,1", edge="ignore")},
    "aligned states": {"aligned_states": AlignedStatesConfig(2.0, "0:0,1:1")},
    "encoder states": {"encoder_states": EncoderStatesConfig(2.0, offsets="same below", features_width=6)},
    "accumulation": {"registers": RegisterConfig("2d", 5), "micro_batch": 3},
    "activation checkpointing": {"registers": RegisterConfig("2d", 5), "activation_checkpointing": True},
    "no clipping": {"clip": 0.0},
    "cosine and a falling weight": {
        "registers": RegisterConfig("2d", 5, weight_schedule="linear"), "schedule": "cosine", "steps": 9,
    },
    "adapter": {"registers": RegisterConfig("2d", 5), "init": "a base", "lora_rank": 2},
    "drafter": {
        "registers": RegisterConfig("1d", 16, next_token=False), "init": "a base", "lora_rank": 2,
        "lora_inputs": "registers",
    },
}  # fmt: skip


def two_steps(config: TrainConfig):
    """A function that takes two optimizer steps with dropout and EMA as train() takes them, on META, and returns the
    sums."""
    model = fake_model(config.model, META)
    model.recompute = config.activation_checkpointing
    if config.lora_rank:
        lora.add_adapter(model, config.lora_rank, config.lora_alpha, config.lora_inputs)
    ema = ModelEmaV3(model, config.ema_decay)
    with META:
        objective, runtime = Objective(model, [own.to(META) for own in auxiliaries_of(config)]), runtime_on(META)
    optimizer = build_optimizer(objective, config)

    def work() -> torch.Tensor:
        sums = zero_sums(objective, runtime)
        skipped = torch.zeros(2, dtype=torch.int64, device=runtime.device)
        for step in range(2):
            batch = read(fake_set(META), META)
            batch = dataclasses.replace(batch, features=torch.zeros(8, 16, 6, dtype=torch.float16, device=META))
            train_step(objective, objective, optimizer, batch, config, runtime, step=step, sums=sums, skipped=skipped)
            objective.after_step()
            ema.update(model, step=step + 1)
        return sums

    return work


@pytest.fixture
def training(tiny_config):
    """changes -> TrainConfig of the fake set."""
    model = dataclasses.replace(tiny_config, residual_dropout=0.1, token_dropout=0.1, ffn_dropout=0.1, drop_path=0.1)
    return lambda **changes: TrainConfig(model=model, batch_size=8, codes="codes", ema_decay=0.9, **changes)


@pytest.mark.parametrize("changes", TRAININGS.values(), ids=TRAININGS.keys())
def test_a_training_step_obeys_the_rules(on_meta, training, changes):
    assert on_meta(two_steps(training(**changes))).device == META


def test_validation_obeys_the_rules(on_fake_cuda, training, registers, monkeypatch):
    """Up to its end, where the sums become numbers."""
    monkeypatch.setattr(validate, "means_of", lambda sums, *rest: sums)

    def work():
        config = training(registers=registers)
        objective = Objective(fake_model(config.model), auxiliaries_of(config))
        return validate.validate(objective, fake_set(), np.arange(20), config, runtime_on(CUDA))

    assert on_fake_cuda(work).device == CUDA


TINY_TOKENIZER = TokenizerConfig(32, (8, 8, 8), 1, 8, 4, 32, attention=True, norm_groups=4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_encoding_obeys_the_rules(on_fake_cuda, precision):
    def work():
        with CUDA:
            tokenizer = VQTokenizer(TINY_TOKENIZER).eval().requires_grad_(False)
        crops = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
        codes = encode._encode(tokenizer, crops, precision, runtime_on(CUDA))
        return tokenizer.decode(codes.unflatten(1, (8, 8)))

    assert on_fake_cuda(work).device == CUDA


def test_a_step_of_the_tokenizer_obeys_the_rules(on_meta):
    """Both losses, the use of codes, and the revival of dead ones."""

    def work():
        config = TokenizerTrainConfig(model=TINY_TOKENIZER, entropy_weight=0.1, adversarial_weight=0.5)
        with META:
            model, discriminator = VQTokenizer(config.model), losses.PatchDiscriminator()
            images, idle = torch.zeros(3, 3, 32, 32), torch.zeros(32, dtype=torch.int64)
        done = model(images, losses.ENTROPY_TEMPERATURE, True)
        terms = losses.generator_losses(images, done, config, fake_scores=discriminator(done.images))
        terms["loss"].backward()
        losses.discriminator_loss(discriminator(images), discriminator(done.images.detach())).backward()
        counts = count_codes(done.quantized.codes, 32)
        candidates = done.quantized.encoded.detach().permute(0, 2, 3, 1).flatten(0, 2)
        uniforms = torch.zeros(32, dtype=torch.float64, device=META)
        return revive_dead_codes(model.quantizer.codebook, idle, counts, candidates, 20, uniforms)

    assert on_meta(work).device == META


def features_and_moments() -> torch.Tensor:
    with CUDA:
        network = create_small("resnet10t", 5, {"channels": (8, 8, 8, 8), "stem_width": 8})
        extractor = TimmFeatures(network, 32, (0.5,) * 3, (0.5,) * 3, identity={"name": "small"})
        found = moments.Moments(extractor.layers["pool"], 3, CUDA)
        pictures = torch.zeros(200, 3, 24, 24, dtype=torch.uint8)
    for start in range(0, 1000, 200):
        with torch.no_grad():
            found.update(extractor(pictures)["pool"], start)
    found.all_reduce(runtime_on(CUDA))
    return found.scatter


def test_features_and_their_moments_obey_the_rules(on_fake_cuda):
    assert on_fake_cuda(features_and_moments).device == CUDA


FAULTS = {
    "item": lambda x: x.sum().item(),
    "a branch on a tensor": lambda x: 1 if x.sum() > 0 else 2,
    "nonzero": lambda x: x.nonzero(),
    "cpu": lambda x: x.cpu(),
    "a constant on the CPU": lambda x: x + torch.ones(3),
    "pinning": lambda x: x.pin_memory(),
    "a boolean index": lambda x: x[x > 0],
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(on_fake_cuda, fault):
    with pytest.raises((BrokenRule, RuntimeError)):
        on_fake_cuda(lambda: fault(torch.zeros(3, device=CUDA)))


def test_the_fault_that_stopped_every_training_is_caught(on_fake_cuda, monkeypatch):
    """Codes that lay on the GPU were pinned."""
    import mutor_vision.data.order

    monkeypatch.setattr(mutor_vision.data.order, "to_device", lambda tensor, device: tensor.pin_memory().to(device))
    with pytest.raises(BrokenRule, match="pins memory"):
        on_fake_cuda(lambda: read(fake_set()))


def in_train_step(fault):
    """train_step's loss with a fault in it."""
    from mutor_vision.training import step as module

    total = module.total_loss
    return module, "total_loss", lambda *arguments: fault(total(*arguments))


PLANTED = {
    "the loss is read in every step": in_train_step(lambda loss: loss * float(loss.item() > -1)),
    "a branch on the loss": in_train_step(lambda loss: loss if loss > 0 else -loss),
    "a weight that stayed on the CPU": in_train_step(lambda loss: (loss * torch.ones(1)).sum()),
    "clipping that looks at the norm": (
        torch.nn.utils, "clip_grad_norm_", partial(torch.nn.utils.clip_grad_norm_, error_if_nonfinite=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED.values(), ids=PLANTED.keys())
def test_a_fault_planted_in_the_training_step_is_caught(on_meta, training, monkeypatch, fault):
    monkeypatch.setattr(*fault)
    with pytest.raises((BrokenRule, RuntimeError)):
        on_meta(two_steps(training(registers=RegisterConfig("2d", 5))))


def test_faults_planted_in_scoring_and_in_the_use_of_codes_are_caught(on_fake_cuda, monkeypatch):
    with pytest.raises(BrokenRule):
        on_fake_cuda(lambda: torch.bincount(torch.zeros(9, dtype=torch.int64, device=CUDA), minlength=32))
    for fault in (
        lambda self, x: self.forward_features(x).cpu().mean((2, 3)),
        lambda self, x: self.forward_features(x).mean((2, 3)) + torch.ones(8),
    ):
        monkeypatch.setattr("timm.models.resnet.ResNet.forward_head", lambda self, x, pre_logits=False, f=fault: f(
            self, torch.zeros(200, 3, 24, 24, device=x.device)))  # fmt: skip
        with pytest.raises((BrokenRule, RuntimeError)):
            on_fake_cuda(features_and_moments)


class Replayed(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: the operations of one call are kept with their tensors, and played again
    without Python; whatever Python decided in the call stays as it was."""

    def __init__(self, step):
        super().__init__()
        self.calls = []
        before = step()  # a graph is warmed up before it is recorded
        del before
        with self:
            step()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        self.calls.append((function, arguments, named or {}, result))
        return result

    def __call__(self):
        for function, arguments, named, kept in self.calls:
            result = function(*arguments, **named)
            for old, new in zip(_tensors(kept), _tensors(result), strict=True):
                assert old.shape == new.shape and old.dtype == new.dtype
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(value):
    return [each for each in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(each, torch.Tensor)]


def test_a_pass_of_a_forecast_obeys_the_rules(on_fake_cuda, tiny_config, drawing):
    """All but the question how far the images are, which waits for the device once a pass."""

    def work():
        settings, model = SampleSettings(**drawing), fake_model(tiny_config).eval()
        scales = guidance_scales(settings, 16)
        guided, labels = num_guided_tokens(scales), torch.zeros(3, dtype=torch.int64, device=CUDA)
        keys = torch.zeros(3, 16, 2, dtype=torch.int32, device=CUDA)
        with torch.no_grad():
            begun = Forecast(4, 2)._begin(model, labels, keys, scales, settings, keep=False)
            forecast_step(model, begun.cache, begun.tokens, begun.start, keys, begun.scales, guided, 16, settings, 4, 2)
        return begun.start

    assert on_fake_cuda(work).device.type == "cuda"


@pytest.mark.parametrize("decoder", [StaticSteps, partial(Forecast, 4, 2)], ids=["static", "forecast"])
def test_a_replayed_step_draws_the_same_codes(random_model, drawing, monkeypatch, decoder):
    """Same addresses, no number of the step that Python kept, nothing whose size depends on data."""
    monkeypatch.setattr(StaticSteps, "REACH", 4)
    monkeypatch.setattr(Forecast, "REACH", 4)
    labels, indices, static = torch.arange(16) % 5, np.arange(16), decoder(record=Replayed)
    expected = generate(random_model, labels, SampleSettings(**drawing), seed=0, indices=indices)
    for size in (5, 16, 3):
        got = generate(random_model, labels[:size], SampleSettings(**drawing), seed=0, indices=indices[:size],
                       decoder=static)  # fmt: skip
        assert torch.equal(got, expected[:size])
