import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mutor_vision.auxiliary_config import ParallelHeadsConfig, RegisterConfig
from mutor_vision.commands.plan import data, plan, table, with_token_set
from mutor_vision.config import TrainConfig, TransformerConfig
from mutor_vision.errors import UserError
from mutor_vision.model import fast_paths
from mutor_vision.model.transformer import Transformer, num_parameters
from mutor_vision.objectives.auxiliary import auxiliaries_of
from mutor_vision.objectives.objective import Objective
from mutor_vision.presets import TRANSFORMERS
from mutor_vision.settings import override
from mutor_vision.training.cost import ACCELERATORS, flops, memory, parameters, saved_per_layer

SIZES = [(2, 2, 64, 128, (4, 4)), (3, 4, 128, 512, (8, 8)), (1, 4, 96, 64, (8, 4))]
BATCH = 5  # with which no activation has the shape of a weight


def tiny(size, share, **changes) -> TrainConfig:
    """share: registers as a share of the slots."""
    layers, heads, dim, codes, grid = size
    count = int(share * grid[0] * grid[1])
    model = TransformerConfig(layers, heads, dim, codes, 5, grid)
    registers = RegisterConfig("2d", count, max_offset=2) if count else RegisterConfig()
    return TrainConfig(model=model, registers=registers, batch_size=BATCH, **changes)


def sequence_of(config: TrainConfig):
    codes = torch.randint(config.model.vocab_size, (BATCH, *config.model.grid))
    return objective_of(config).sequence(codes, seed=0, sample_index=np.arange(BATCH))


def objective_of(config: TrainConfig, model: Transformer | None = None) -> Objective:
    return Objective(model or Transformer(config.model), auxiliaries_of(config))


@pytest.mark.parametrize("name", ["imagenet256-B-next-token", "imagenet256-3B-mutor-2d", "digits-mutor-2d"])
def test_parameters_are_those_of_the_model(name):
    config, _ = with_token_set(name, TRANSFORMERS[name])
    with torch.device("meta"):
        assert parameters(config.model).total == num_parameters(Transformer(config.model))


@pytest.mark.parametrize("share", [0, 0.4, 1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_flops_are_those_that_torch_counts(size, share):
    """Linear layers over a real forward and backward pass, in which torch counts nothing for the CPU's kernel of
    attention; that by products of all pairs of inputs, of which the plan counts those that look at each other."""
    config = tiny(size, share)
    model, sequence = Transformer(config.model).eval(), sequence_of(config)
    counted = flops(config)
    with FlopCounterMode(display=False) as counter:
        sum(objective_of(config, model)(torch.zeros(BATCH, dtype=torch.int64), sequence).values()).backward()
    linear = BATCH * 3 * (counted.blocks + counted.head)
    # The head does not run for registers without a target.
    linear -= 3 * 2 * parameters(config.model).head * (BATCH * config.registers.count - sequence.num_register_targets)
    assert counter.get_total_flops() == pytest.approx(linear, rel=0.05)

    n, r = config.model.num_tokens, config.registers.count
    q, k, v = (torch.rand(1, config.model.heads, n + r, config.model.head_dim, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(2, 3) @ v).sum().backward()
    share_of_pairs = (n * (n + 1) / 2 + r * (n + 1)) / (n + r) ** 2
    assert 3 * counted.attention == pytest.approx(config.model.layers * counter.get_total_flops() * share_of_pairs)


def test_flops_of_parallel_heads_are_those_that_torch_counts():
    """Each head a block over the causal inputs, and the unembedding of its own targets."""
    config = dataclasses.replace(tiny(SIZES[0], 0), parallel_heads=ParallelHeadsConfig(3))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective_of(config)(torch.zeros(BATCH, dtype=torch.int64), sequence_of(config))
    matrices = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    counted, alone = flops(config), flops(dataclasses.replace(config, parallel_heads=ParallelHeadsConfig()))
    assert BATCH * (counted.blocks + counted.head) == matrices
    assert counted.attention == alone.attention * (config.model.layers + 2) / config.model.layers


def test_flops_of_the_paper():
    """153, 201 and 307 GFLOP an image for 0, 80 and 256 registers, where every input costs the same: 599 MFLOP."""
    for name, expected in (("next-token", 153e9), ("mutor-2d-80", 201e9), ("mutor-2d", 307e9)):
        assert flops(TRANSFORMERS[f"imagenet256-B-{name}"]).training == pytest.approx(expected, rel=0.02)
    values = plan("", TRANSFORMERS["imagenet256-B-mutor-2d-80"], "h100", 8, 0.5)
    assert values["flops_per_image"]["relative_to_next_token"] == pytest.approx(1.31, abs=0.015)
    assert values["time"]["images_per_second"] / 8 == pytest.approx(2456, rel=0.02)


def kept_by_a_block(config: TrainConfig, precision: str) -> int:
    """Bytes that autograd keeps of the last block, without weights and without what all blocks share."""
    model, inside, kept, given = Transformer(config.model), [False], {}, set()
    block = model.blocks[-1]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {
        shape for p in block.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)
    }  # of casts of weights

    def begin(module, arguments):
        inside[0] = True
        x, sin, cos, attend = arguments
        shared = [sin, cos] if getattr(attend, "mask", None) is None else [sin, cos, attend.mask]
        given.update(tensor.untyped_storage().data_ptr() for tensor in shared)

    def keep(tensor):
        storage = tensor.untyped_storage()
        is_cast = tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if inside[0] and not is_cast and storage.data_ptr() not in weights | given:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    if config.compile == "on":
        block.forward = torch.compile(block.forward, dynamic=False)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        objective_of(config, model)(torch.zeros(BATCH, dtype=torch.int64), sequence_of(config))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("share", [0, 0.4, 1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_a_block_keeps_is_what_autograd_keeps(size, share, dropout, precision):
    if share and not fast_paths.prefix_attention():
        pytest.skip("the plan counts what the merged attention of registers keeps, which this machine does not use")
    config = override(tiny(size, share), [f"model.{name}_dropout={dropout}" for name in ("residual", "ffn")])
    expected = sum(
        saved_per_layer(
            config, config.registers.count, 2 if precision == "bfloat16" else 4, on_cpu=True, compiled=False
        ).values()
    )
    assert kept_by_a_block(config, precision) == pytest.approx(BATCH * expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_a_compiled_block_keeps(precision):
    """What torch chooses to compute anew is its business; without registers, whose kernel on a CPU is not CUDA's."""
    config = tiny(SIZES[1], 0, compile="on")
    expected = sum(
        saved_per_layer(
            config, config.registers.count, 2 if precision == "bfloat16" else 4, on_cpu=True, compiled=True
        ).values()
    )
    assert kept_by_a_block(config, precision) == pytest.approx(BATCH * expected, rel=0.05)


def test_settings_change_what_they_should():
    base = TRANSFORMERS["imagenet256-L-mutor-2d-80"]

    def of(*settings, gpus=8, gpu="h100"):
        return plan("", override(base, list(settings)), gpu, gpus, 0.4)

    plain, memory_of = of(), lambda values: values["memory"]
    recomputed = of("activation_checkpointing=true")
    assert memory_of(recomputed)["activations"] < 0.3 * memory_of(plain)["activations"]
    assert recomputed["time"]["seconds"] == pytest.approx(4 / 3 * plain["time"]["seconds"], rel=0.05)
    sharded = of("parallel=fsdp")
    for name in ("weights", "gradients", "moments", "ema"):
        assert memory_of(sharded)[name] * 8 == memory_of(plain)[name]
    assert memory_of(of("micro_batch=32"))["activations"] * 4 == memory_of(plain)["activations"]
    assert memory_of(of("precision=float32"))["activations"] > 1.5 * memory_of(plain)["activations"]
    assert of("registers.kind=2d", "registers.count=256")["flops_per_image"]["relative_to_next_token"] > 2
    assert memory_of(of("ema_decay=0"))["ema"] == 0
    assert memory_of(of("batch_size=512"))["activations"] * 2 == memory_of(plain)["activations"]
    assert of(gpu="b200")["time"]["gpu_hours"] == pytest.approx(plain["time"]["gpu_hours"] * 989 / 2250)


def test_the_largest_micro_batch_is_the_largest_that_fits():
    config = override(TRANSFORMERS["imagenet256-XL-mutor-2d"], ["micro_batch=0"])
    for gpu in ACCELERATORS:
        values = plan("", config, gpu, 8, 0.4)
        usable, best = values["memory"]["usable"], values["largest_micro_batch"]
        assert values["fits"] == (best == 128)
        assert not best or memory(config, 8, best).total <= usable
        assert best == 128 or memory(config, 8, max(1, 2 * best)).total > usable


@pytest.mark.parametrize("name", [name for name, config in TRANSFORMERS.items() if config.lora_inputs == "all"])
def test_every_preset_has_a_plan(name):
    config, assumed = with_token_set(name, TRANSFORMERS[name])
    assert bool(assumed) != name.startswith("imagenet256")
    values = json.loads(json.dumps(plan(name, config, "a100", 8, 0.4)))
    assert all(math.isfinite(x) and x >= 0 for x in [*values["memory"].values(), *values["time"].values()])
    assert name in table(values) and max(map(len, table(values).splitlines())) < 120


@pytest.mark.parametrize(
    "settings, arguments, message",
    [
        ([], ("h1000", 8, 0.4), "gpu is 'h1000', expected one of a100"),
        ([], ("h100", 7, 0.4), "batch_size 1024 cannot be split over 7"),
        ([], ("h100", 0, 0.4), "cannot be split over 0"),
        ([], ("h100", 8, 40.0), "mfu is 40.0"),
        (["micro_batch=129"], ("h100", 8, 0.4), "micro_batch is 129"),
        (["parallel=zero"], ("h100", 8, 0.4), "parallel is 'zero', expected ddp or fsdp"),
        (["lora_rank=8", "init=base"], ("h100", 8, 0.4), "lora_rank is set"),
        (["lora_inputs=registers", "registers.kind=1d", "registers.count=8"], ("h100", 8, 0.4), "lora_inputs is set"),
    ],
)
@pytest.mark.bad_input("settings")
def test_what_cannot_be_planned_is_refused(settings, arguments, message):
    with pytest.raises(UserError, match=message):
        plan("", override(TRANSFORMERS["imagenet256-B-next-token"], settings), *arguments)


def test_the_command_writes_its_figures(tmp_path, command):
    out = tmp_path / "folder" / "plan.json"
    words = ("--preset", "digits-mutor-2d", "--set", "batch_size=32", "--gpu", "cpu", "--json", out)
    printed = command("mutor", "plan", *words).out
    assert "digits-mutor-2d on 1 x cpu, ddp, float32" in printed and "assumed: 7x7 codes of 64" in printed
    assert json.loads(out.read_text())["micro_batch"] == 32


def test_each_loss_has_its_line(command):
    """What it adds, its parameters, its teacher; they sum to what all of them together cost."""
    config = override(
        TRANSFORMERS["imagenet256-B-aligned-states-llamagen"], ["private_blocks.weight=0.1", "registers.kind=2d",
        "registers.count=80"],
    )  # fmt: skip
    values = plan("", config, "h100", 8, 0.4)
    losses, alone = values["losses"], plan("", TRANSFORMERS["imagenet256-B-next-token"], "h100", 8, 0.4)
    assert list(losses) == ["registers", "private_blocks", "aligned_states"]
    added = values["flops_per_image"]["training"] - alone["flops_per_image"]["training"]
    assert sum(loss["training"] for loss in losses.values()) == added
    assert losses["registers"]["parameters"] == 0
    lines = [line for line in table(values).splitlines() if line.startswith("  aligned states")]
    assert len(lines) == 1 and "92,022,528 parameters in training only; teacher 29.8, forward only" in lines[0]


def test_the_bytes_of_a_token_set_are_those_on_disk(token_set_path, train_config):
    """But for the headers of its four arrays."""
    model = dataclasses.replace(train_config.model, vocab_size=32, num_classes=5, grid=(4, 4))
    found = data(dataclasses.replace(train_config, model=model), images=60, views=2)
    assert found["disk"] + 4 * 128 == sum(path.stat().st_size for path in token_set_path.glob("*.npy"))
    assert found["epochs"] == train_config.steps * train_config.batch_size / 60
    with pytest.raises(UserError, match="images is 0"):
        data(train_config, images=0, views=2)
