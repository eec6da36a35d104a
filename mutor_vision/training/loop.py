"""Training of the transformer, one flat function: next-token prediction, MuToR-1D and MuToR-2D differ in what
add_registers returns and in nothing else."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3
from tqdm import tqdm

from mutor_vision.config import TrainConfig
from mutor_vision.data.order import SampleOrder, read_batch, split
from mutor_vision.data.token_set import TokenSet
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.keyed_random import choose, derived_seed
from mutor_vision.model import lora
from mutor_vision.model.base import RECORD, Base, load_base, open_base, with_sizes_of_base
from mutor_vision.model.transformer import Transformer, num_parameters
from mutor_vision.objectives.heads import ParallelHeads
from mutor_vision.objectives.objective import Objective
from mutor_vision.objectives.registers import place_registers
from mutor_vision.runtime import Runtime, start
from mutor_vision.schedule import check_warmup, due
from mutor_vision.settings import differences
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json, sha256, write_json
from mutor_vision.storage.outputs import check_out_folder
from mutor_vision.storage.run_log import RunLog
from mutor_vision.training import sharding
from mutor_vision.training.optim import build_optimizer
from mutor_vision.training.step import other_weight, train_step
from mutor_vision.training.validate import means_of, validate


def check_tokenizer(base: Base, token_set: TokenSet) -> None:
    """Raise MismatchError when the base is known to have learnt the codes of another tokenizer."""
    for root in (base.folder, base.folder.parent.parent):
        if (root / "token_set.json").is_file():
            known = read_json(root / "token_set.json")["tokenizer_sha256"]
            if known and known != token_set.tokenizer_identity:
                raise MismatchError(
                    f"{base.folder} was trained on codes of tokenizer {known[:12]}, {token_set.path} holds those of "
                    f"{token_set.tokenizer_identity[:12]}; encode the images with the base's tokenizer"
                )


# What may change when a run is continued: how long it lasts and what it reports. The rest would be another experiment.
RESUMABLE = {"steps", "log_every", "val_every", "val_images", "sample_every", "sample_classes", "sample_cfg_scale",
             "save_every", "keep", "micro_batch", "activation_checkpointing", "parallel", "codes", "val_codes", "init",
             "eval_every", "eval_reference", "eval_features", "eval_weights", "eval_images", "compile"}  # fmt: skip


def train(config: TrainConfig, out: Path) -> None:
    """Train config.model on config.codes and keep everything in the run directory `out`. Running it again with the
    same configuration continues from the newest checkpoint, on CPU to the last bit as if it had never stopped."""
    runtime = start(config.precision)
    check_out_folder(out)

    # --- data and configuration -------------------------------------------------------------------------------------
    token_set = TokenSet.open(config.codes)
    config = resolve(config, token_set)
    val_set = TokenSet.open(config.val_codes) if config.val_codes else token_set
    train_images, held_out = split(token_set, 0.0 if config.val_codes else config.val_fraction)
    held_out = np.arange(val_set.num_images) if config.val_codes else held_out
    val_images = held_out[choose(0, "validation images", len(held_out), config.val_images)]  # whatever the run's seed
    check(config, token_set, val_set, len(train_images), runtime)
    order = SampleOrder(train_images, config.seed)
    measure = distance_measure(config, runtime) if config.eval_every else None

    # --- model, optimizer, EMA --------------------------------------------------------------------------------------
    torch.manual_seed(derived_seed(config.seed, "initialisation"))
    model = Transformer(config.model)
    model.recompute = config.activation_checkpointing
    base = open_base(config.init) if config.init else None
    if base:
        check_tokenizer(base, token_set)
        load_base(model, base, say=print if runtime.is_main else lambda line: None)
    if config.lora_rank:
        lora.add_adapter(model, config.lora_rank, config.lora_alpha)
    kept = lora.adapter_weights if config.lora_rank else torch.nn.Module.state_dict
    model = model.to(runtime.device)
    ema = ModelEmaV3(model, config.ema_decay, use_warmup=True, warmup_gamma=10, warmup_power=1) if config.ema_decay else None  # noqa: E501  # fmt: skip
    heads = ParallelHeads(config.model, config.parallel_heads).to(runtime.device) if config.parallel_heads > 1 else None
    objective = Objective(model, heads)
    compiled = config.compile == "on" or (config.compile == "auto" and runtime.device.type == "cuda")
    if compiled:
        for block in model.blocks:  # after the copy for EMA, which only samples and validates
            block.compile(dynamic=False)
    # The cache of sampling grows, and each length would be compiled anew.
    uncompiled = partial(torch.compiler.set_stance, "force_eager") if compiled else nullcontext

    # --- resume -----------------------------------------------------------------------------------------------------
    found = resume(out, config, token_set, base, model, ema, heads, runtime)
    parallel = sharding.parallelize(objective, ema.module if ema else None, config.parallel, runtime)
    optimizer = build_optimizer(objective, config)
    if found:
        sharding.load_optimizer(optimizer, model, found, runtime)
    step = checkpoint.step_of(found) if found else 0
    log = RunLog(out, step, config.steps, active=runtime.is_main)
    free = torch.cuda.mem_get_info(runtime.device)[0] if runtime.device.type == "cuda" else 0
    if token_set.nbytes < free / 4:
        token_set.keep_on(runtime.device)
    if runtime.is_main:
        trained = f" ({lora.describe_trainable(model)})" if config.lora_rank else ""
        print(f"{num_parameters(model):,} parameters{trained}, {len(train_images):,} training and "
              f"{len(val_images):,} held-out images, {runtime.world_size} process(es) on {runtime.device.type}, "
              f"{'bfloat16 autocast' if runtime.autocast_dtype else 'float32'}{', compiled' if compiled else ''}"
              + (f", continuing after step {step}" if step else ""), flush=True)  # fmt: skip
    log.status("running", step)

    # --- the loop ---------------------------------------------------------------------------------------------------
    sums = torch.zeros(4, dtype=runtime.sum_dtype, device=runtime.device)  # of train_step, since the last log line
    since, last = time.perf_counter(), step
    bar = tqdm(total=config.steps * config.batch_size, initial=step * config.batch_size, unit=" images",
               unit_scale=True, desc=out.name, disable=not runtime.is_main, dynamic_ncols=True)  # fmt: skip
    model.train()
    try:
        while step < config.steps:
            torch.manual_seed(derived_seed(config.seed, "dropout", step, runtime.rank))
            batch = read_batch(token_set, order, step=step, batch_size=config.batch_size, rank=runtime.rank,
                               world_size=runtime.world_size, label_dropout=config.label_dropout,
                               device=runtime.device)  # fmt: skip
            gradient_norm, lr = train_step(parallel, objective, optimizer, batch, config, runtime, step=step, sums=sums)
            step += 1
            if ema:
                ema.update(model, step=step)
            bar.update(config.batch_size)

            # --- report ---
            if due(step, config.log_every, config.steps):
                other = "heads" if heads else "register"
                means = means_of(runtime.all_reduce(sums), other, other_weight(objective, config, step - 1))
                seconds = time.perf_counter() - since
                if not np.isfinite(means["loss"]) or not torch.isfinite(gradient_norm):
                    reason = f"loss {means['loss']:.4g}, gradient norm {gradient_norm:.4g} at step {step}"
                    raise UserError(f"training diverged: {reason}; start again with a lower lr; --init {out} begins "
                                    "with its last checkpoint")  # fmt: skip
                speed = (step - last) * config.batch_size / seconds
                log.write(step, images=step * config.batch_size, **means, lr=lr, gradient_norm=gradient_norm.item(),
                          images_per_second=round(speed, 2))  # fmt: skip
                bar.set_postfix(loss=f"{means['loss']:.3f}")
                sums.zero_()
                since, last = time.perf_counter(), step
            saved = due(step, config.save_every, config.steps) or step == config.steps
            sampled = due(step, config.sample_every, config.steps)
            measured = due(step, config.eval_every, config.steps)
            if saved or sampled or measured:
                modules = {"model": model} | ({"ema": ema.module} if ema else {})
                weights = {name: kept(module) for name, module in modules.items()}
                weights |= {"heads": heads.state_dict()} if heads else {}
                checkpoint.check_finite(weights, [optimizer], step, runtime)
            if len(val_images) and due(step, config.val_every, config.steps):
                score = lambda m: validate(sharding.whole(m), val_set, val_images, config, runtime)  # noqa: E731
                scores = {f"val_{name}": value for name, value in score(model).items()}
                if ema:
                    scores |= {f"val_{name}_ema": value for name, value in score(ema.module).items()}
                log.write(step, **scores)
                if runtime.is_main:
                    bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            if sampled:
                whole = sharding.whole(ema.module if ema else model)
                if runtime.is_main:
                    from mutor_vision.sampling.stream import save_training_grid

                    with uncompiled():
                        save_training_grid(whole, out, step, config, runtime)
                    model.train()
            if measured:
                with uncompiled():
                    scores = measure(sharding.whole(ema.module if ema else model), out)
                model.train()
                log.write(step, **scores)
                if runtime.is_main:
                    bar.write(f"step {step}: Frechet distance {scores['fd']:.4f} of {scores['fd_images']} samples")
            if saved:
                weights = {name: sharding.gather(tensors, runtime.is_main) for name, tensors in weights.items()}
                shards = sharding.save_optimizer(optimizer, model, out, runtime)
                if runtime.is_main:
                    state = {"step": step} | ({} if shards else {"optimizer": optimizer.state_dict()})
                    checkpoint.save(out, step, _kind(config), config, weights, state, config.keep, shards)
                    log.status("running", step)
                runtime.barrier()
        log.status("done", step)
    except BaseException as error:
        log.failed(step, error)
        raise
    finally:
        bar.close()
        log.close()


def distance_measure(config: TrainConfig, runtime: Runtime) -> Callable[[Transformer, Path], dict[str, float]]:
    """Collective (model, run) -> {'fd', 'fd_images'} of samples with fixed seeds and labels, guided like the sample
    grids. Everything that can be wrong with the reference or the extractor is raised here, before training."""
    from mutor_vision.features import extractors as features
    from mutor_vision.sampling.load import training_model
    from mutor_vision.sampling.stream import default_batch_size, label_plan, sample_stream, settings_in_training
    from mutor_vision.training import distance as in_training

    extractor = features.load_extractor(config.eval_features, config.eval_weights or None).to(runtime.device)
    reference = in_training.load_reference(config.eval_reference, extractor, runtime)
    labels = label_plan(config.eval_images, config.model.num_classes)

    def measure(transformer: Transformer, run: Path) -> dict[str, float]:
        loaded = training_model(transformer, run, config, runtime)
        stream = sample_stream(loaded, labels, settings_in_training(config), 0, default_batch_size(loaded))
        return in_training.distance(extractor, reference, (images for _, images in stream), runtime)

    return measure


def resolve(config: TrainConfig, token_set: TokenSet) -> TrainConfig:
    """Fill what the base and the token set decide; raise MismatchError where they or the configuration differ."""
    if config.init:
        config = with_sizes_of_base(config)
    model = config.model
    for name, value in (
        ("vocab_size", token_set.codebook_size),
        ("num_classes", len(token_set.class_names)),
        ("grid", tuple(token_set.grid)),
    ):
        current = getattr(model, name)
        if current in (0, (0, 0)):
            model = dataclasses.replace(model, **{name: value})
        elif current != value:
            raise MismatchError(
                f"model.{name} is {current}, but the token set {config.codes} has {value}; "
                f"encode with another tokenizer or set model.{name}={value}"
            )
    return dataclasses.replace(config, model=model)


def check(config: TrainConfig, token_set: TokenSet, val_set: TokenSet, num_images: int, runtime: Runtime) -> None:
    """Raise UserError for the first setting that cannot work, before anything expensive is built."""
    check_warmup(config.steps, config.warmup_steps)
    world = runtime.world_size
    if config.batch_size % world:
        raise UserError(f"batch_size {config.batch_size} cannot be split over {world} processes; use a multiple")
    if config.batch_size > num_images:
        raise UserError(f"batch_size is {config.batch_size}, but there are {num_images} training images; lower it")
    if config.micro_batch > config.batch_size // world:
        raise UserError(f"micro_batch is {config.micro_batch}, expected 0 to batch_size / processes")
    if val_set.tokenizer_identity != token_set.tokenizer_identity or val_set.class_names != token_set.class_names:
        raise MismatchError(
            f"{config.val_codes} and {config.codes} differ in tokenizer or classes; "
            "encode both with the same tokenizer and class folders"
        )
    if config.registers.count:
        place_registers(config.registers, config.model.grid, seed=0, sample_index=np.zeros(1, dtype=np.int64))


def resume(
    out: Path, config: TrainConfig, token_set: TokenSet, base, model, ema, heads, runtime: Runtime
) -> Path | None:
    """Load the weights of the newest checkpoint of `out` and return it, or start the run directory and return None.
    Raises MismatchError when the run was started with other settings, another token set or another base, and what
    checkpoint.open_run raises."""
    found = checkpoint.open_run(out, _kind(config))
    record = base.record() if base else None
    load = lora.load_adapter if config.lora_rank else checkpoint.load_strictly
    if found is not None:
        # A schedule other than constant ends at `steps`, so another number of steps is another run.
        constant = config.schedule == config.registers.weight_schedule == "constant"
        allowed = RESUMABLE - (set() if constant else {"steps"})
        before = checkpoint.read_config(found, _kind(config), TrainConfig)
        changed = [d for d in differences(before, config) if d.split(":")[0] not in allowed]
        if sha256(out / "token_set.json") != token_set.identity:
            changed.append(f"token set: {config.codes} is another one")
        if bool(before.init) != bool(base) or (base and read_json(out / RECORD) != record):
            changed.append(f"init: '{config.init}' holds other weights than '{before.init}' did")
        if changed:
            raise MismatchError(f"{out} was trained with other settings ({'; '.join(changed)}); use another --out")
        load(model, checkpoint.read_weights(found, "model"), found / "model.safetensors")
        if ema:
            load(ema.module, checkpoint.read_weights(found, "ema"), found / "ema.safetensors")
        if heads:
            checkpoint.load_strictly(heads, checkpoint.read_weights(found, "heads"), found / "heads.safetensors")
    runtime.barrier()  # every rank has looked at the folder before rank 0 writes to it
    if runtime.is_main:
        checkpoint.write_config(out, _kind(config), config)
        if found is None:
            if base:
                write_json(out / RECORD, record)
            shutil.copyfile(Path(config.codes) / "manifest.json", out / "token_set.json")
            shutil.copytree(token_set.tokenizer_path, out / "tokenizer", copy_function=_link, dirs_exist_ok=True)
    runtime.barrier()
    return found


def _kind(config: TrainConfig) -> str:
    return "adapter" if config.lora_rank else "transformer"


def _link(source: str, target: str) -> None:
    # A hard link costs no space; another file system takes a copy.
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
