"""What only a GPU can show: every stage gives on CUDA what it gives on the CPU, graphs and compiled blocks included."""

import dataclasses
import gc
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from mutor_vision.config import ParallelHeadsConfig, RegisterConfig, TrainConfig, TransformerConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.runtime import Runtime
from mutor_vision.sampling.draw import SampleSettings, exponentials, noise_keys
from mutor_vision.sampling.forecast import Forecast
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.static import StaticSteps
from mutor_vision.storage.run_log import read_log

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NO_DROPOUT = TransformerConfig(2, 2, 32, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
OBJECTIVES = {
    "next-token": {"registers": RegisterConfig()},
    "1d": {"registers": RegisterConfig("1d", 5)},
    "2d": {"registers": RegisterConfig("2d", 6)},
    "2d, every slot": {"registers": RegisterConfig("2d", 16)},
    "2d, blind to itself": {"registers": RegisterConfig("2d", 6, self_attention=False)},
    "heads": {"registers": RegisterConfig(), "parallel_heads": ParallelHeadsConfig(3)},
    "accumulation": {"registers": RegisterConfig("2d", 6), "micro_batch": 5},
    "recomputation": {"registers": RegisterConfig("2d", 6), "activation_checkpointing": True},
}


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products in float32, so that devices can be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def train_on(monkeypatch):
    """train(config, out) on a given device."""
    from mutor_vision.training import loop as train_loop

    def run(device, config, out):
        start = train_loop.start
        monkeypatch.setattr(train_loop, "start", lambda precision: start(precision, device))
        train_loop.train(config, out)
        monkeypatch.setattr(train_loop, "start", start)
        return [line["loss"] for line in read_log(out) if "loss" in line]

    return run


def write_pictures(folder, classes, each, pixels):
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(small).resize((pixels, pixels)).save(folder / name / f"{i}.png")


def model_on(device, config):
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model.to(device).eval().requires_grad_(False)


@pytest.mark.parametrize("changes", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_training_follows_the_curve_of_the_cpu(train_config, train_on, tmp_path, changes):
    config = dataclasses.replace(train_config, model=NO_DROPOUT, precision="float32", compile="off", **changes)
    curves = [train_on(device, config, tmp_path / device) for device in ("cpu", "cuda")]
    assert curves[1] == pytest.approx(curves[0], rel=2e-4)


def test_a_lora_adapter_trains_to_the_curve_of_the_cpu(train_config, trained_run, train_on, tmp_path):
    config = dataclasses.replace(
        train_config, model=NO_DROPOUT, precision="float32", compile="off", init=str(trained_run), lora_rank=2
    )
    curves = [train_on(device, config, tmp_path / device) for device in ("cpu", "cuda")]
    assert curves[1] == pytest.approx(curves[0], rel=2e-4)


@pytest.mark.parametrize("objective", ["next-token", "2d", "heads", "recomputation"])
def test_compiled_blocks_in_bfloat16_follow_the_curve_roughly(train_config, train_on, tmp_path, objective):
    """With the settings of a user: automatic precision and compilation, EMA, validation, a grid of samples."""
    config = dataclasses.replace(train_config, model=NO_DROPOUT, sample_every=10, **OBJECTIVES[objective])
    expected = train_on("cpu", config, tmp_path / "cpu")
    assert train_on("cuda", config, tmp_path / "cuda") == pytest.approx(expected, rel=2e-2)
    assert (tmp_path / "cuda" / "samples" / "step-0000010.png").stat().st_size > 1000


def test_dropout_trains_and_resumes(train_config, train_on, tmp_path):
    config = dataclasses.replace(train_config, compile="off", precision="float32")
    whole = train_on("cuda", config, tmp_path / "whole")
    train_on("cuda", dataclasses.replace(config, steps=5), tmp_path / "cut")
    assert train_on("cuda", config, tmp_path / "cut") == pytest.approx(whole, rel=1e-5)


def test_a_steady_step_never_synchronises(train_config, train_on, tmp_path, monkeypatch):
    """torch itself raises at every wait for the device, in every step after the first."""
    from mutor_vision.training import loop as train_loop

    calls = Counter()

    def watched(name):
        function = getattr(train_loop, name)

        def call(*arguments, **named):
            torch.cuda.set_sync_debug_mode("error" if calls[name] else "default")
            try:
                return function(*arguments, **named)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                calls[name] += 1

        return call

    for name in ("read_batch", "train_step"):
        monkeypatch.setattr(train_loop, name, watched(name))
    train_on("cuda", dataclasses.replace(train_config, precision="float32", compile="off"), tmp_path / "run")
    assert calls == {"read_batch": train_config.steps, "train_step": train_config.steps}


def test_decoding_draws_the_codes_of_the_cpu_and_graphs_the_same(tiny_config, drawing, monkeypatch):
    monkeypatch.setattr(StaticSteps, "REACH", 4)
    labels, indices, static = torch.arange(16) % 5, np.arange(16), StaticSteps()
    expected = generate(model_on(CPU, tiny_config), labels, SampleSettings(**drawing), seed=0, indices=indices)
    model, labels = model_on(CUDA, tiny_config), labels.to(CUDA)
    plain = generate(model, labels, SampleSettings(**drawing), seed=0, indices=indices)
    assert (plain.cpu() == expected).float().mean() > 0.98
    for size in (5, 16, 3):
        part = labels[:size], SampleSettings(**drawing)
        graphs = generate(model, *part, seed=0, indices=indices[:size], decoder=static)
        again = generate(model, *part, seed=0, indices=indices[:size], decoder=static)
        assert torch.equal(graphs, again)
        assert (graphs == plain[:size]).float().mean() > 0.98


def test_forecasts_by_graphs_draw_the_codes_of_one_token_after_another(tiny_config, drawing, monkeypatch):
    monkeypatch.setattr(Forecast, "REACH", 8)
    model, indices, forecast = model_on(CUDA, tiny_config), np.arange(16), Forecast(4, 2)
    labels = torch.arange(16, device=CUDA) % 5
    plain = generate(model, labels, SampleSettings(**drawing), seed=0, indices=indices)
    for size in (5, 16, 3):
        part = labels[:size], SampleSettings(**drawing)
        got = generate(model, *part, seed=0, indices=indices[:size], decoder=forecast)
        assert torch.equal(got, generate(model, *part, seed=0, indices=indices[:size], decoder=forecast))
        assert (got == plain[:size]).float().mean() > 0.9  # a near-tie changes the tokens after it as well
    assert forecast.passes < forecast.tokens


def test_noise_is_that_of_the_cpu():
    keys = noise_keys(0, np.arange(50), 16).flatten(0, 1)
    torch.testing.assert_close(exponentials(keys.to(CUDA), 4096).cpu(), exponentials(keys, 4096), rtol=1e-5, atol=0)


@pytest.mark.parametrize("decoder", [StaticSteps, Forecast])
def test_graphs_take_no_new_memory_from_batch_to_batch(tiny_config, decoder):
    model, static, labels = model_on(CUDA, tiny_config), decoder(), torch.arange(16, device=CUDA) % 5

    def reserved():
        generate(model, labels, SampleSettings(), seed=0, indices=np.arange(16), decoder=static)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    reserved()
    assert len({reserved() for _ in range(5)}) == 1


def test_encoding_gives_the_codes_of_the_cpu(tiny_tokenizer_path):
    from mutor_vision.runtime import exact_float32
    from mutor_vision.tokenizer.model import load_tokenizer

    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    on_cpu, on_gpu = (load_tokenizer(tiny_tokenizer_path, device) for device in (CPU, CUDA))
    expected = on_cpu.encode(images)
    with exact_float32():
        codes, decoded = on_gpu.encode(images.to(CUDA)).cpu(), on_gpu.decode(expected.to(CUDA)).cpu()
    assert (codes == expected).float().mean() > 0.99
    torch.testing.assert_close(decoded, on_cpu.decode(expected), atol=1e-3, rtol=0)


def test_a_tokenizer_trains(tmp_path):
    from mutor_vision.config import TokenizerConfig, TokenizerTrainConfig
    from mutor_vision.tokenizer.train import train_tokenizer

    write_pictures(tmp_path / "images", ("ant", "bee"), each=12, pixels=32)
    config = TokenizerTrainConfig(
        model=TokenizerConfig(32, (8, 8, 8), 1, 8, 4, 32, False, 4), data=str(tmp_path / "images"), val_fraction=0.2,
        steps=6, batch_size=8, adversarial_weight=0.1, adversarial_start=2, dead_code_steps=2, log_every=1,
        val_every=3, sample_every=3, save_every=3,
    )  # fmt: skip
    train_tokenizer(config, tmp_path / "run")
    assert all(np.isfinite(line["loss"]) for line in read_log(tmp_path / "run") if "loss" in line)


def test_metrics_equal_those_of_the_cpu():
    from mutor_vision.features.moments import Moments
    from mutor_vision.metrics import copies, density, frechet, mind, scores

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 64, generator=generator), torch.randn(400, 64, generator=generator) + 0.1
    found = {}
    for device in (CPU, CUDA):
        moments, runtime = [], Runtime(0, 1, device, None)
        for rows in features:
            moments.append(Moments(64, device=device))
            moments[-1].update(rows, 0)
        root = frechet.root(moments[1].total())
        found[device] = (
            frechet.distance(moments[0].total(), root),
            *scores.precision_recall(*features, runtime, 3),
            mind.monge_distance(*features, 400, 300, 20, runtime).value,
            density.Balls(features[1], 5, runtime).occupied_by(features[0]).density,
            copies.nearest(*features, runtime).distance.mean().item(),
        )
    assert found[CUDA] == pytest.approx(found[CPU], rel=1e-6)


def test_features_equal_those_of_the_cpu():
    from mutor_vision.features.extractors import load_extractor
    from mutor_vision.runtime import exact_float32

    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = load_extractor("inception", "random")
    expected = extractor(images)
    with exact_float32():
        got = extractor.to(CUDA)(images.to(CUDA))
    for name, value in expected.items():
        assert (got[name].cpu() - value).norm() < 1e-4 * value.norm(), name


def test_an_evaluation_goes_from_run_to_page(root, trained_run, tmp_path):
    write_pictures(tmp_path / "reference", ("ant", "bee", "cat", "dog", "eel"), each=8, pixels=16)
    result = subprocess.run(
        [sys.executable, "eval/fid.py", "--model", trained_run, "--num-images", "40", "--reference",
         tmp_path / "reference", "--features", "timm:resnet10t", "--weights", "random", "--report",
         tmp_path / "page.html", "--json", tmp_path / "m.json", "--groups", "0"],
        cwd=root, capture_output=True, text=True, env=_environment(root),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "page.html").stat().st_size > 1000


def _environment(root):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}


PARALLEL = """
import sys, torch, torch.distributed as dist
from mutor_vision.config import ParallelHeadsConfig, RegisterConfig, TrainConfig, TransformerConfig
from mutor_vision.data.order import Batch
from mutor_vision.objectives.auxiliary import auxiliaries_of
from mutor_vision.objectives.objective import Objective
from mutor_vision.training.optim import build_optimizer
from mutor_vision.runtime import Runtime
from mutor_vision.training.step import train_step, zero_sums
from mutor_vision.model.transformer import Transformer
from mutor_vision.training import sharding
import numpy as np
from torch.nn.parallel import DistributedDataParallel
kind = sys.argv[1]
torch.cuda.set_device(0)
dist.init_process_group("nccl", rank=0, world_size=1, init_method="tcp://127.0.0.1:" + sys.argv[2])
runtime = Runtime(0, 1, torch.device("cuda", 0), torch.bfloat16)
config = TrainConfig(model=TransformerConfig(2, 2, 64, 32, 5, (4, 4), 0.0, 0.0, 0.0),
                     registers=RegisterConfig("2d", 6), batch_size=8)
torch.manual_seed(0)
objective = Objective(Transformer(config.model), auxiliaries_of(config)).cuda()
if kind == "ddp":
    parallel = DistributedDataParallel(objective, device_ids=[0], gradient_as_bucket_view=True, broadcast_buffers=False)
elif kind == "fsdp":
    sharding._shard(objective, runtime)
    parallel = objective
else:
    parallel = objective
optimizer = build_optimizer(objective, config)
sums = zero_sums(objective, runtime)
skipped = torch.zeros(2, dtype=torch.int64, device=runtime.device)
generator = torch.Generator().manual_seed(0)
batch = Batch(torch.randint(32, (8, 4, 4), generator=generator).cuda(), (torch.arange(8) % 5).cuda(), np.arange(8))
for step in range(5):
    train_step(parallel, objective, optimizer, batch, config, runtime, step=step, sums=sums, skipped=skipped)
print(*(sums[0] / sums[1]).tolist())
dist.destroy_process_group()
"""


def test_ddp_and_fsdp_over_nccl_train_like_neither(root):
    losses = {}
    for port, kind in enumerate(("plain", "ddp", "fsdp"), start=29611):
        result = subprocess.run([sys.executable, "-c", PARALLEL, kind, str(port)], cwd=root, capture_output=True,
                                text=True, env=_environment(root))  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        losses[kind] = [float(number) for number in result.stdout.split()[-2:]]
    assert losses["ddp"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["fsdp"] == pytest.approx(losses["plain"], rel=1e-3)


@pytest.mark.parametrize("registers", [0, 80])
@pytest.mark.parametrize("compiled, above", [(False, 0.15), (True, 0.35)])
def test_memory_is_what_the_plan_says(registers, compiled, above):
    """GPT-B's width with fewer layers; peak of allocated memory after three steps. For compiled blocks the plan is up
    to a third too high (measured: a quarter), since the compiler keeps less than is counted; never too low."""
    from mutor_vision.data.order import Batch
    from mutor_vision.objectives.auxiliary import auxiliaries_of
    from mutor_vision.objectives.objective import Objective
    from mutor_vision.training import cost as plan
    from mutor_vision.training.optim import build_optimizer
    from mutor_vision.training.step import train_step, zero_sums

    config = TrainConfig(
        model=TransformerConfig(4, 12, 768, 16384, 1000, (16, 16)), batch_size=32, ema_decay=0.0,
        registers=RegisterConfig("2d", registers) if registers else RegisterConfig(),
        compile="on" if compiled else "off",
    )  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    objective = Objective(Transformer(config.model), auxiliaries_of(config)).cuda()
    if compiled:
        for block in objective.transformer.blocks:
            block.compile(dynamic=False)
    optimizer = build_optimizer(objective, config)
    codes = torch.randint(16384, (32, 16, 16), device=CUDA)
    runtime = Runtime(0, 1, CUDA, torch.bfloat16)
    sums = zero_sums(objective, runtime)
    skipped = torch.zeros(2, dtype=torch.int64, device=runtime.device)
    for step in range(3):
        batch = Batch(codes, torch.arange(32, device=CUDA), np.arange(32) + 32 * step)
        train_step(objective, objective, optimizer, batch, config, runtime, step=step, sums=sums, skipped=skipped)
    measured = torch.cuda.max_memory_allocated() - before
    planned = plan.memory(config, 1, 32).total
    assert 0.95 * measured < planned < (1 + above) * measured
