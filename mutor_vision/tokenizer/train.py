"""The tokenizer's training loop: one flat function, two optimizers (the second for the discriminator, if any)."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mutor_vision.config import TokenizerTrainConfig
from mutor_vision.data.folder import batched, check_apart
from mutor_vision.data.images import center, save_png, to_float
from mutor_vision.data.reading import TrainingCrops, Views, open_source, read_batches
from mutor_vision.data.source import Source
from mutor_vision.errors import ImageError, MismatchError, UserError
from mutor_vision.keyed_random import permutation, uniforms
from mutor_vision.preemption import Preemption
from mutor_vision.progress import progress
from mutor_vision.runtime import Runtime, blamed, start
from mutor_vision.schedule import check_warmup, due, learning_rate
from mutor_vision.settings import differences, to_dict
from mutor_vision.storage import checkpoint, lock
from mutor_vision.storage.outputs import check_out_folder
from mutor_vision.storage.run_log import RunLog, write_status
from mutor_vision.storage.trackers import check_trackers
from mutor_vision.tokenizer import losses
from mutor_vision.tokenizer.model import VQTokenizer
from mutor_vision.tokenizer.quantizer import VectorQuantizer, count_codes, quantizer_named, usage
from mutor_vision.tokenizer.reconstruction import reconstruct, score_reconstructions, side_by_side
from mutor_vision.tokenizer.repairs import forget_bad, listed, only_repaired, recall_bad, record_bad, without_bad

# Settings that may differ when a run is continued (`steps` only with a constant learning rate). Paths of images may,
# because the images themselves are compared by fingerprint; the others do not change what a step computes.
MAY_CHANGE = {
    "data", "val_data", "val_images", "skip_bad", "verify", "steps", "workers", "keep", "log_every", "val_every",
    "sample_every", "save_every",
}  # fmt: skip

PATHS = ("data", "val_data", "lpips_weights", "perceptual_weights")  # in the configuration


def train_tokenizer(config: TokenizerTrainConfig, out: str | Path, trackers: Sequence[str] = ()) -> Path:
    """Train in the run directory `out` to config.steps, continuing from its newest checkpoint if it has one; returns
    the last checkpoint. On the CPU a continued run equals an uninterrupted one bit for bit; a run whose learning rate
    ends at `steps` is therefore not continued to another number of steps. trackers: see RunLog.

    Raises UserError for wrong settings, DataError for images that cannot be read, and MismatchError when the run was
    begun with other settings or images."""
    runtime = start(config.precision)
    check_trackers(trackers)
    check_warmup(config.steps, config.warmup_steps)
    quantizer_named(config.model.quantizer).check_training(config)
    if config.batch_size % runtime.world_size:
        raise UserError(f"batch_size {config.batch_size} is no multiple of the {runtime.world_size} processes")
    if config.lpips_weight > 0 and not config.lpips_weights:  # presets leave the file to the user
        raise UserError("lpips_weight is above 0 and needs the file lpips_weights; give it, or set lpips_weight=0")
    out, device, begun = Path(out), runtime.device, time.monotonic()

    # Images. Position k = step * batch_size + i fixes image and crop; there is no other state of the data.
    check_apart(config.data, out)
    check_out_folder(out)
    newest = _continued(config, out)
    state = checkpoint.read_training_state(newest) if newest else {}
    source = open_source(config.data)
    suspects = recall_bad(out) + list(state.get("skipped", {}))
    runtime.check_same(to_dict(config) | dict.fromkeys(PATHS, "") | {"data": len(source)})
    source = without_bad(source, out, config.skip_bad, config.verify, suspects, runtime)
    source, train_indices, val_source, val_indices = split(config, source)
    images_of_classes, repaired = source.fingerprints_of_classes(), []
    check_all_images(out, [(source, train_indices), (val_source, val_indices)], runtime)
    size = config.model.image_size
    crops = TrainingCrops(source, train_indices, size, config.seed, config.min_crop_scale)
    val_views = Views(val_source, size, center)
    files = f"{source.fingerprint()} {len(train_indices)}"
    runtime.check_same({"data": files})

    # Models and optimizers.
    torch.manual_seed(config.seed)
    model = VQTokenizer(config.model).to(device)
    ema = None
    if config.ema_decay > 0:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=config.betas, fused=True)
    distances = losses.perceptual_distances(config).to(device)
    discriminator: Any = None  # both, without its loss
    optimizer_d: Any = None
    if config.adversarial_weight > 0:
        discriminator = losses.PatchDiscriminator(config.discriminator_width, config.discriminator_layers).to(device)
        optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=config.lr, betas=config.betas, fused=True)
    idle_steps = torch.zeros(config.model.codebook_size, dtype=torch.int64, device=device)
    weights: dict[str, Any] = {"model": model, "ema": ema and ema.module, "discriminator": discriminator}
    weights = {name: module for name, module in weights.items() if module is not None}

    # Begin, or continue.
    first_step = 0
    lock.hold(out, runtime)  # not before: what is no run of ours gets no file
    if newest is not None:
        repaired = state.get("repaired", [])
        if state["files"] != files:
            bad, before = suspects, state.get("images_of_classes", [])
            if not only_repaired(bad, before, images_of_classes, source.class_names):
                raise MismatchError(
                    f"{out} was begun with other images in {config.data}; restore them or give a new --out"
                )
            repaired = sorted({*repaired, *bad} - {*source.skipped})
            if runtime.is_main:
                print(f"{out} goes on with {len(bad)} image(s) replaced or removed, as its checkpoints record; if some "
                      "were removed, the order and a held-out share are drawn anew", flush=True)  # fmt: skip
        for name, module in weights.items():
            checkpoint.load_strictly(module, checkpoint.read_weights(newest, name), newest)
        checkpoint.load_optimizer(optimizer, state, "optimizer", newest)
        if optimizer_d is not None:
            checkpoint.load_optimizer(optimizer_d, state, "optimizer_d", newest)
        idle_steps.copy_(state["idle_steps"])
        first_step = state["step"]
    runtime.barrier()  # rank 0 writes to the run directory only after every rank has looked for a checkpoint in it
    if newest is not None and runtime.is_main:
        checkpoint.tidy(out, newest, config.keep)
    if first_step >= config.steps:
        if runtime.is_main:
            write_status(out, "done", first_step, first_step)  # not said yet, if it was killed after its last save
            more = "; a larger --steps goes on" if config.schedule == "constant" else ""
            print(f"{out} has {first_step} of {config.steps} steps already{more}", flush=True)
        assert newest is not None  # it has the steps
        return newest
    if runtime.is_main:
        checkpoint.write_config(out, "tokenizer", config)
    log = RunLog(out, first_step, config.steps, active=runtime.is_main, trackers=trackers, config=to_dict(config))
    log.status("running", first_step)
    preemption = Preemption(runtime)
    runtime.barrier()
    trained, trained_d = _distributed(model, runtime), discriminator and _distributed(discriminator, runtime)

    positions = [
        range(step * config.batch_size + runtime.rank, (step + 1) * config.batch_size, runtime.world_size)
        for step in range(first_step, config.steps)
    ]
    sums: dict[str, Any] = {}
    counts, rounds, clock = torch.zeros_like(idle_steps), 0, time.monotonic()
    bar = progress(total=config.steps, initial=first_step, unit="step")
    step = first_step
    try:
        for batch in read_batches(crops, positions, config.workers):
            images = to_float(batch.to(device, non_blocking=True))
            rate = learning_rate(
                step, schedule=config.schedule, lr=config.lr, steps=config.steps, warmup_steps=config.warmup_steps
            )
            adversarial = discriminator is not None and step >= config.adversarial_start
            rounding = step >= config.quantize_after
            step += 1  # from here on the number of finished steps, as it is at the end of this one

            # The autoencoder.
            with runtime.autocast():
                temperature = losses.ENTROPY_TEMPERATURE if config.entropy_weight > 0 else 0.0
                reconstruction = trained(images, temperature, rounding)
                if adversarial:
                    discriminator.requires_grad_(False)  # it scores here, and is trained below
                fake_scores = discriminator(reconstruction.images) if adversarial else None
                terms = losses.generator_losses(images, reconstruction, config, distances, fake_scores)
            _update(optimizer, terms["loss"], rate, config.clip)

            # The discriminator.
            if adversarial:
                discriminator.requires_grad_(True)
                with runtime.autocast():
                    real_scores, fake_scores = trained_d(images), trained_d(reconstruction.images.detach())
                    terms["discriminator"] = losses.discriminator_loss(real_scores, fake_scores)
                _update(optimizer_d, terms["discriminator"], rate, config.clip)

            # The codebook, and the average of the weights.
            new_counts = count_codes(reconstruction.quantized.codes, len(counts))
            counts += new_counts
            if config.dead_code_steps > 0:
                # Latents of the step's first 8 images, the same for any number of processes.
                some = reconstruction.quantized.encoded[: max(1, 8 // runtime.world_size)].detach().contiguous()
                some = rearrange(runtime.gather(some), "(rank i) c h w -> (i rank h w) c", rank=runtime.world_size)
                draws = torch.from_numpy(uniforms(config.seed, "revive", np.array([step]), len(counts))[0])
                cast(VectorQuantizer, model.quantizer).revive_dead_codes(
                    idle_steps, runtime.all_reduce(new_counts), some, config.dead_code_steps, draws.to(device)
                )
            if ema is not None:
                ema.update(model, step=step)

            # The log. Nothing above waits for the device.
            stopping = preemption.asked()
            rounds += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            if due(step, config.log_every, config.steps):
                means = {name: runtime.all_reduce(value).item() / rounds / runtime.world_size
                         for name, value in sums.items()}  # fmt: skip
                if not math.isfinite(means["loss"]):
                    raise UserError(f"the loss is {means['loss']} at step {step}; lower lr, or set clip above 0")
                means["psnr"] = 10 * math.log10(4 / max(means["l2"], 1e-9))  # of pixels in [0, 1]: a quarter of l2
                share, perplexity = usage(runtime.all_reduce(counts))
                speed = rounds * config.batch_size / (time.monotonic() - clock)
                log.write(step, **means, lr=rate, usage=share, perplexity=perplexity, images_per_s=speed)
                bar.set_postfix_str(
                    f"loss {means['loss']:.4f}, {means['psnr']:.2f} dB, codes {share:.0%}, {speed:.0f} images/s"
                )
                sums, counts, rounds, clock = {}, torch.zeros_like(idle_steps), 0, time.monotonic()
            bar.update()

            # Validation, pictures, checkpoints.
            paused = time.monotonic()
            saved = due(step, config.save_every, config.steps) or step == config.steps or stopping
            sampled = due(step, config.sample_every, config.steps)
            if saved or sampled:
                tensors = {name: module.state_dict() for name, module in weights.items()}
                checkpoint.check_finite(tensors, [o for o in (optimizer, optimizer_d) if o], step, runtime)
            if due(step, config.val_every, config.steps) and len(val_indices):
                for name in [name for name in ("model", "ema") if name in weights]:
                    mine = list(batched(val_indices[runtime.rank :: runtime.world_size].tolist(), 32))
                    scores = score_reconstructions(
                        weights[name], read_batches(val_views, mine, config.workers), runtime
                    )
                    log.write(step, **{f"val/{name}/{key}": value for key, value in scores.items()})
                    if runtime.is_main:
                        bar.write(
                            f"step {step}: held-out images with {name} weights: {scores['psnr']:.2f} dB, "
                            f"{scores['usage']:.0%} of codes used"
                        )
            if sampled and runtime.is_main:
                views, indices = (val_views, val_indices) if len(val_indices) else (
                    Views(source, size, center), train_indices)  # fmt: skip
                chosen = indices[permutation(config.seed, "examples", 0, len(indices))[:16]]
                originals = torch.cat([views[i] for i in chosen]).to(device)
                copies, _ = reconstruct(weights.get("ema", model), originals)
                path = out / "samples" / f"step-{step:07d}.png"
                save_png(side_by_side(originals, copies), path)
                log.picture(step, path)
            if saved:
                state = {"step": step, "files": files, "idle_steps": idle_steps, "optimizer": optimizer.state_dict(),
                         "images_of_classes": images_of_classes, "repaired": repaired,
                         "skipped": source.skipped}  # fmt: skip
                if optimizer_d is not None:
                    state["optimizer_d"] = optimizer_d.state_dict()
                if runtime.is_main:
                    newest = checkpoint.save(out, step, "tokenizer", config, tensors, state, config.keep)
                    log.status("running", step)
                    forget_bad(out)  # the checkpoint records the repaired images
                runtime.barrier()
            if stopping and step < config.steps:
                raise preemption.stopped(step)
            clock += time.monotonic() - paused  # images/s counts training alone
    except BaseException as raised:
        error = blamed(raised, f"step {step}")  # the one in progress
        log.failed(step, error)
        if isinstance(error, ImageError):
            record_bad(out, source, error, runtime.rank)
        if error is not raised:
            raise error from None
        raise
    finally:
        preemption.end()
        bar.close()
        log.close()
    log.status("done", step)
    if runtime.is_main:
        look = f"; look at {out / 'samples'}" if config.sample_every else ""
        print(f"{out}: {step} steps in {time.monotonic() - begun:.0f} s{look}", flush=True)
    return out / "checkpoints" / f"step-{step:07d}"


def split(config: TokenizerTrainConfig, source: Source) -> tuple[Source, np.ndarray, Source, np.ndarray]:
    """(training source `source`, numbers of its images to train on, validation source, numbers of its images to score).
    Held-out images are chosen by config.seed; without validation the last is empty."""
    if config.val_data:
        if Path(config.val_data).resolve() == Path(config.data).resolve():
            raise UserError(f"val_data is data ({config.data}); give other images, or val_fraction to hold some out")
        val_source = open_source(config.val_data)
        train, held_out = np.arange(len(source)), permutation(config.seed, "held-out", 0, len(val_source))
    else:
        val_source, order = source, permutation(config.seed, "held-out", 0, len(source))
        count = max(1, round(len(source) * config.val_fraction)) if config.val_fraction > 0 else 0
        train, held_out = np.sort(order[count:]), order[:count]
    if not len(train):
        raise UserError(f"{config.data} has {len(source)} image(s), all held out; set val_fraction=0 or add images")
    return source, train, val_source, np.sort(held_out[: config.val_images])


def _continued(config: TokenizerTrainConfig, out: Path) -> Path | None:
    """The newest checkpoint of `out`; None for a new run. Raises MismatchError when the run has other settings, and
    what open_run raises."""
    found = checkpoint.open_run(out, "tokenizer")
    if found is not None:
        allowed = MAY_CHANGE - (set() if config.schedule == "constant" else {"steps"})
        begun = checkpoint.read_config(found, "tokenizer", TokenizerTrainConfig)
        if changed := [line for line in differences(begun, config) if line.split(":")[0] not in allowed]:
            raise MismatchError(
                f"{out} was begun with other settings ({'; '.join(changed)}); repeat those, or a new --out"
            )
    return found


def check_all_images(out: Path, sets: list[tuple[Source, np.ndarray]], runtime: Runtime) -> None:
    """Collective. Look at every image before the first step (Source.check); raises one ImageError for all that cannot
    be used, and records those of the first source in a run that has begun."""
    errors = []
    if runtime.is_main:
        for source in {id(source): source for source, _ in sets}.values():  # one may be both trained and scored on
            numbers = np.concatenate([numbers for other, numbers in sets if other is source])
            try:
                source.check(numbers.tolist())
            except ImageError as raised:
                errors.append(raised)
        if errors and (out / "config.json").is_file():
            for error in errors:
                record_bad(out, sets[0][0], error)
    paths = [path for error in errors for path in error.paths]
    errors = [listed(error, out) for error in errors]
    runtime.raise_together(ImageError("; ".join(map(str, errors)), *paths) if errors else None)


def _distributed(module: nn.Module, runtime: Runtime) -> nn.Module:
    if runtime.world_size == 1:
        return module
    # Without broadcast of buffers: it would overwrite the discriminator's running statistics between its two passes,
    # and training does not read them.
    devices = [runtime.device.index] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = optimizer.param_groups[0]["params"]
    if clip > 0:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
