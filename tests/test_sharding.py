"""FSDP by two processes on the CPU, against DDP and against one process."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mutor_vision.config import ParallelHeadsConfig, RegisterConfig, TrainConfig, TransformerConfig
from mutor_vision.runtime import finish
from mutor_vision.storage import checkpoint
from mutor_vision.storage.run_log import read_log
from mutor_vision.training.loop import train

pytestmark = pytest.mark.slow
NO_DROPOUT = TransformerConfig(2, 2, 32, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)


def curve(run, name="loss"):
    return [line[name] for line in read_log(run) if name in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_config, forked):
    """Folder of runs by name."""
    folder = tmp_path_factory.mktemp("sharding")
    plain = dataclasses.replace(train_config, model=NO_DROPOUT)
    train(plain, folder / "one")
    train(dataclasses.replace(plain, steps=5), folder / "one, then two")
    heads = ParallelHeadsConfig(2, weight=0.25)
    both = dataclasses.replace(train_config, parallel_heads=heads, more_ema_decays=(0.5,))  # and registers
    sharded = {"parallel": "fsdp"}
    bfloat16 = {"precision": "bfloat16"}
    trainings = [
        (both, {}, "ddp"),
        (both, sharded, "fsdp"),
        (both, sharded | {"steps": 5}, "fsdp, cut"),
        (both, sharded, "fsdp, cut"),
        (plain, sharded | {"micro_batch": 2, "activation_checkpointing": True}, "fsdp, small parts"),
        (plain, sharded, "one, then two"),
        (plain, sharded | {"steps": 5}, "two, then one"),
        (both, bfloat16, "ddp bfloat16"),
        (both, sharded | bfloat16, "fsdp bfloat16"),
    ]

    def work():
        for config, changes, out in trainings:
            train(dataclasses.replace(config, **changes), folder / out)
        finish()

    result = forked(work, ranks=2)
    assert result.code == 0, result.out[-3000:]
    shutil.copytree(folder / "two, then one", folder / "two")
    train(plain, folder / "two, then one")
    return folder


@pytest.mark.parametrize("name", ["loss", "heads", "val_next_token", "val_next_token_ema",
                                  "val_next_token_ema-0.5", "val_register"])  # fmt: skip
def test_fsdp_trains_to_the_curve_of_ddp(runs, name):
    """With dropout, EMA, registers, parallel heads and clipping."""
    assert len(curve(runs / "ddp", name)) >= 2
    assert curve(runs / "fsdp", name) == pytest.approx(curve(runs / "ddp", name), rel=1e-5)
    norms = [curve(runs / run, "gradient_norm") for run in ("fsdp", "ddp")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_in_bfloat16_too(runs):
    assert curve(runs / "fsdp bfloat16") == pytest.approx(curve(runs / "ddp bfloat16"), rel=1e-2)
    assert curve(runs / "fsdp bfloat16") != pytest.approx(curve(runs / "fsdp"), rel=1e-6)


@pytest.mark.parametrize("run", ["fsdp, small parts", "one, then two", "two, then one"])
def test_the_number_of_processes_and_the_parts_of_a_batch_do_not_matter(runs, run):
    """Gradient accumulation with activation checkpointing; a checkpoint of one process continued by two that shard it,
    and one of two continued by one."""
    assert curve(runs / run) == pytest.approx(curve(runs / "one"), rel=1e-5)


def test_resume_equals_uninterrupted_bit_for_bit(runs):
    assert curve(runs / "fsdp, cut") == curve(runs / "fsdp")
    first, second = (checkpoint.newest(runs / run) for run in ("fsdp, cut", "fsdp"))
    files = [path.relative_to(first) for path in first.rglob("*.safetensors")]
    assert len(files) == 6  # weights, heads, two averages, and the moments of two processes
    for file in files:
        tensors, others = load_file(first / file), load_file(second / file)
        assert tensors.keys() == others.keys() and len(tensors) > 7
        assert all(torch.equal(tensors[name], others[name]) for name in tensors), file


def test_a_sharded_run_is_read_like_any_other(runs):
    from mutor_vision.runtime import start
    from mutor_vision.sampling.load import load

    folder = checkpoint.newest(runs / "two")
    assert checkpoint.weight_names(folder) == ["ema", "model"]
    assert load(runs / "two", start()).transformer.config.dim == 32
    weights = checkpoint.read_weights(folder, "model")
    for name, expected in checkpoint.read_weights(runs / "one" / "checkpoints" / folder.name, "model").items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)


def test_a_damaged_shard_is_found(runs, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "run")
    folder = checkpoint.newest(tmp_path / "run")
    shard = sorted((folder / "optimizer").iterdir())[1]
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(checkpoint.IntegrityError, match="optimizer/shard-00002.* is damaged"):
        checkpoint.verify(folder)


def test_in_bfloat16_norms_keep_float32_weights():
    """A norm's weights rounded to bfloat16 are another model's, and the fused kernel refuses them beside float32."""
    import torch.distributed as dist

    from mutor_vision.model.transformer import Transformer
    from mutor_vision.objectives.objective import Objective
    from mutor_vision.objectives.register_loss import RegisterLoss
    from mutor_vision.runtime import Runtime
    from mutor_vision.training import sharding

    config = dataclasses.replace(NO_DROPOUT, vocab_size=32, num_classes=5, grid=(4, 4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        registers = RegisterConfig("2d", 3)
        objective = Objective(Transformer(config), [RegisterLoss(registers, TrainConfig(model=config))])
        runtime = Runtime(0, 1, torch.device("cpu"), torch.bfloat16)
        sharding._shard(objective, runtime)
        seen = {}
        for name, module in objective.transformer.blocks.named_modules():
            if name.endswith(("norm", "qkv")):
                module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: m.weight.dtype}))
        codes = torch.zeros(2, 4, 4, dtype=torch.int64)
        sequence = objective.sequence(codes, seed=0, sample_index=np.arange(2))
        with runtime.autocast():
            sum(objective(torch.zeros(2, dtype=torch.int64), sequence).values()).backward()
    finally:
        dist.destroy_process_group()
    norms = {name: dtype for name, dtype in seen.items() if name.endswith("norm")}
    assert len(norms) == 4 and set(norms.values()) == {torch.float32}
    assert {seen["0.attention.qkv"], seen["1.attention.qkv"]} == {torch.bfloat16}
