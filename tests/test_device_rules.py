"""A GPU's rules, checked without one: under fake CUDA tensors (shapes and devices, no numbers) the steady paths of
training, validation and decoding mix no devices, never wait for the device, and pin nothing but CPU memory."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mutor_vision.data import SampleOrder, read_batch
from mutor_vision.generate import SampleSettings, generate
from mutor_vision.loss import Objective
from mutor_vision.registers import add_registers
from mutor_vision.static_steps import StaticSteps
from mutor_vision.token_set import TokenSet
from mutor_vision.transformer import Transformer

CUDA = torch.device("cuda", 0)
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique")


class BrokenRule(Exception):
    pass


class Rules(TorchDispatchMode):
    """Raises BrokenRule at what would make the host wait for a GPU, or fail on one."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        name = str(function)
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        if on_gpu and name.startswith(WAITS):
            raise BrokenRule(f"{name} waits for the device")
        if on_gpu and "pin_memory" in name:
            raise BrokenRule("pins memory of the GPU")
        target = named.get("device")
        if on_gpu and name.startswith("aten._to_copy") and target is not None and torch.device(target).type == "cpu":
            raise BrokenRule("copies to the CPU")
        if on_gpu and name.startswith("aten.copy_") and arguments[0].device.type == "cpu":
            raise BrokenRule("copies to the CPU")
        return function(*arguments, **named)


@pytest.fixture
def on_fake_cuda(monkeypatch):
    """call(function): its result under the rules. Pinning, which fake tensors lack, is a check and no more."""

    def pin(tensor):
        if tensor.device.type != "cpu":
            raise BrokenRule("pins memory of the GPU")
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)

    def call(function):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), Rules():
                return function()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise BrokenRule(f"waits for the device: {error}") from None

    return call


def fake_model(config) -> Transformer:
    with CUDA:
        return Transformer(config)


def fake_set() -> TokenSet:
    """A token set whose codes lie on the GPU."""
    found = object.__new__(TokenSet)
    found.grid, found.views, found.num_views, found.num_images = (4, 4), ["center"], 1, 60
    found.class_names, found.labels = list("abcde"), torch.zeros(60, dtype=torch.int64)
    found._resident = torch.zeros(60, 1, 16, dtype=torch.int16, device=CUDA)
    return found


def read(token_set):
    return read_batch(token_set, SampleOrder(np.arange(60), 0), step=0, batch_size=8, rank=0, world_size=1,
                      label_dropout=0.1, device=CUDA)  # fmt: skip


def test_a_batch_of_codes_on_the_device_is_not_pinned(on_fake_cuda):
    batch = on_fake_cuda(lambda: read(fake_set()))
    assert batch.codes.device.type == batch.labels.device.type == "cuda" and batch.codes.shape == (8, 4, 4)


def test_the_loss_of_every_kind_of_registers_obeys_the_rules(on_fake_cuda, tiny_config, registers):
    def work():
        batch, objective = read(fake_set()), Objective(fake_model(tiny_config))
        with torch.no_grad():
            sequence = add_registers(batch.codes, registers, register_token=32, seed=0, sample_index=np.arange(8))
            return objective(batch.labels, sequence)

    assert all(term.device.type == "cuda" for term in on_fake_cuda(work))


@pytest.mark.parametrize("static", [False, True])
def test_decoding_obeys_the_rules(on_fake_cuda, tiny_config, drawing, static):
    def work():
        steps = StaticSteps(record=lambda step: step) if static else None
        labels = torch.zeros(3, dtype=torch.int64, device=CUDA)
        return generate(fake_model(tiny_config).eval(), labels, SampleSettings(**drawing), seed=0,
                        indices=np.arange(3), static=steps)  # fmt: skip

    assert on_fake_cuda(work).device.type == "cuda"


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
    import mutor_vision.data

    monkeypatch.setattr(mutor_vision.data, "to_device", lambda tensor, device: tensor.pin_memory().to(device))
    with pytest.raises(BrokenRule, match="pins memory"):
        on_fake_cuda(lambda: read(fake_set()))


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


def test_a_replayed_step_draws_the_same_codes(random_model, drawing, monkeypatch):
    """Same addresses, no number of the step that Python kept, nothing whose size depends on data."""
    monkeypatch.setattr(StaticSteps, "REACH", 4)
    labels, indices, static = torch.arange(16) % 5, np.arange(16), StaticSteps(record=Replayed)
    expected = generate(random_model, labels, SampleSettings(**drawing), seed=0, indices=indices)
    for size in (5, 16, 3):
        got = generate(random_model, labels[:size], SampleSettings(**drawing), seed=0, indices=indices[:size],
                       static=static)  # fmt: skip
        assert torch.equal(got, expected[:size])
