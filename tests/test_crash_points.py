"""A job that is killed at any point, or whose disk becomes full, is started again by the same command, and leaves what
one leaves that was never stopped. Here at a sample of its changes of files; `make test-slow` tries all of them."""

import json
import shutil

import pytest
import torch
from faults.crash_points import Counted, chosen, differing, tree
from faults.score import everything, record
from faults.small_disk import enlarged, mounted

from mutor_vision.errors import UserError
from mutor_vision.storage import checkpoint

SAMPLE = 10  # points of each job
TRAIN = """--set model.layers=1 --set model.heads=2 --set model.dim=16 --set batch_size=12 --set val_every=4
    --set log_every=2 --set save_every=2 --set sample_every=4 --set warmup_steps=0 --steps 8""".split()
TOKENIZER = """--preset digits --set model.image_size=16 --set model.channels=4,4 --set model.latent_channels=4
    --set model.code_dim=4 --set model.codebook_size=16 --set model.norm_groups=2 --set batch_size=4 --steps 4
    --set schedule=constant --set warmup_steps=0 --set val_every=2 --set sample_every=2 --set save_every=1
    --set log_every=1 --set workers=0 --set val_fraction=0.2""".split()


@pytest.fixture
def jobs(images, token_set_path, tiny_tokenizer_path, trained_run):
    """Name -> the words of a command, with {out} in place of a folder that is its own."""
    network = ["--features", "timm:test_efficientnet@32", "--weights", "random", "--batch-size", 4, "--image-size", 16]
    return {
        "training": ["mutor", "train", "--preset", "digits-mutor-2d-15", "--codes", token_set_path, "--set",
                     "registers.count=5", *TRAIN, "--out", "{out}/run"],
        "tokenizer training": ["mutor", "train-tokenizer", "--data", images, *TOKENIZER, "--out", "{out}/run"],
        "encoding": ["mutor", "encode", "--tokenizer", tiny_tokenizer_path, "--data", images, "--shard-size", 4,
                     "--workers", 0, "--out", "{out}/codes"],
        "a set of samples": ["mutor", "sample", trained_run, "--num-images", 6, "--batch-size", 4, "--out",
                             "{out}/set"],
        "samples as npz": ["mutor", "sample", trained_run, "--num-images", 6, "--batch-size", 4, "--out",
                           "{out}/set.npz"],
        "reference statistics": ["mutor", "reference", "--data", images, *network, "--out", "{out}/reference.npz"],
        "scores": ["mutor", "fid", "--samples", images, "--reference", images, *network, "--metrics", "fid,kid",
                   "--json", "{out}/scores.json"],
    }  # fmt: skip


JOBS = ("training", "tokenizer training", "encoding", "a set of samples", "samples as npz", "reference statistics",
        "scores")  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_is_killed_is_started_again(jobs, forked, enter, tmp_path, name):
    def run(folder, kill_at=0, count_to=None):
        folder.mkdir(exist_ok=True)
        words = [str(word).replace("{out}", str(folder)) for word in jobs[name]]

        def job():
            with Counted(folder, kill_at) as counted:
                try:
                    enter(*words)
                finally:
                    if count_to:
                        count_to.write_text("\n".join(counted.seen))

        return forked(job)

    done = run(tmp_path / "whole", count_to=tmp_path / "count")
    assert done.code == 0, done.out
    changes = (tmp_path / "count").read_text().splitlines()
    expected = tree(tmp_path / "whole")
    points = chosen(len(changes), 0 if everything() else SAMPLE)
    failed = []
    for point in points:
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        killed = run(folder, kill_at=point)
        assert killed.code == -9, f"point {point} was not reached: {killed.out[-500:]}"
        again = run(folder)
        if (wrong := differing(tree(folder), expected)) or again.code:
            failed.append(f"killed before {changes[point - 1]} ({point} of {len(changes)}): exit {again.code}, "
                          f"{wrong[:5]}, {again.out[-300:]}")  # fmt: skip
    record("A killed job is started again by the same command", name, len(points) - len(failed), len(points))
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("name", JOBS)
def test_a_disk_that_is_full_is_told_and_space_mends_it(jobs, forked, enter, tmp_path, name):
    """On disks from next to nothing to nearly what the job needs: one line, no wreck, the last checkpoint whole. Then
    the disk is enlarged, and the same command ends as it would have."""
    words = [str(word).replace("{out}", str(tmp_path / "disk")) for word in jobs[name]]
    (tmp_path / "disk").mkdir()
    done = forked(*words)
    assert done.code == 0, done.out
    expected = tree(tmp_path / "disk")
    needed = sum(4 * -(-path.stat().st_size // 4096) + 4 for path in (tmp_path / "disk").rglob("*"))  # kilobytes
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    shares = [1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8]
    tried, failed, result = 0, [], tmp_path / "result.json"
    for share in shares if everything() else shares[1::3]:
        size = max(8, int(share * needed))

        def on_a_small_disk(kilobytes=size):
            if problem := mounted(tmp_path / "disk", kilobytes):
                result.write_text(json.dumps({"skipped": problem}))
                return
            full = forked(*words)
            left = [str(path) for path in (tmp_path / "disk").rglob("*.partial")]
            newest = checkpoint.newest(tmp_path / "disk" / "run") if "training" in name else None
            if newest:
                checkpoint.verify(newest)
            enlarged(tmp_path / "disk", 4 * needed + 10_000)
            again = forked(*words)
            found = {"code": full.code, "out": full.out, "left": left, "again": again.code, "then": again.out}
            result.write_text(json.dumps({**found, "equal": tree(tmp_path / "disk") == expected}))

        ended = forked(on_a_small_disk)
        assert ended.code == 0, ended.out
        found = json.loads(result.read_text())
        if "skipped" in found:
            pytest.skip(f"a small disk needs root: {found['skipped']}")
        if found["code"] == 0:
            continue  # it was large enough
        tried += 1
        lines = [line for line in found["out"].splitlines() if line.startswith("error: ")]
        told = found["code"] == 2 and len(lines) == 1 and "Traceback" not in found["out"]
        if not told or "space" not in lines[0] or found["left"] or found["again"] or not found["equal"]:
            failed.append(f"{size} of {needed} kB: {found}"[:1500])
    record("A full disk is told, and space mends it", name, tried - len(failed), tried)
    assert tried and not failed, "\n\n".join(failed)


def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path, train_config, monkeypatch):
    run, weights = tmp_path / "run", {"model": {"w": torch.ones(300_000)}}
    checkpoint.save(run, 1, "transformer", train_config, weights, {"step": 1}, keep=2)
    before = tree(run)
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_100_000))
    with pytest.raises(UserError, match=r"step 2 needs 1\.2 MB, 1\.1 MB are free at .*checkpoints; make space"):
        checkpoint.save(run, 2, "transformer", train_config, weights, {"step": 2}, keep=2)
    assert tree(run) == before


def test_a_kill_while_saving_loses_at_most_what_is_being_saved(forked, tmp_path, train_config):
    """Every point of a save, with and without older checkpoints to remove, and again over the wreck that it left."""
    generator = torch.Generator().manual_seed(0)
    weights = {step: {"model": {"w": torch.randn(300, generator=generator)}} for step in range(1, 6)}

    def save(run, step):
        checkpoint.save(run, step, "transformer", train_config, weights[step], {"step": step}, keep=2)

    tried = held = 0
    for before in ((), (1,), (1, 2), (1, 2, 3)):
        step = len(before) + 1
        run = tmp_path / f"count-{step}"
        for earlier in before:
            save(run, earlier)
        with Counted(run) as counted:
            save(run, step)
        for point in chosen(counted.count, 0 if everything() else 2 * SAMPLE):
            run = tmp_path / f"{step}-{point}"
            for earlier in before:
                save(run, earlier)

            def killed(run=run, point=point, step=step):
                with Counted(run, point):
                    save(run, step)

            assert forked(killed).code == -9
            tried += 1
            found = checkpoint.newest(run)
            newest = checkpoint.step_of(found) if found else 0
            assert newest in (step - 1, step), f"point {point}: newest is {newest}"
            if found:
                assert torch.equal(checkpoint.read_weights(found, "model")["w"], weights[newest]["model"]["w"])
            save(run, step)  # over whatever was left
            save(run, step + 1)
            names = sorted(path.name for path in (run / "checkpoints").iterdir())
            assert names == [f"step-{number:07d}" for number in (step, step + 1)], f"point {point}: {names}"
            held += 1
    record("A killed job is started again by the same command", "saving a checkpoint", held, tried)
    assert tried >= 50


def test_a_save_is_flushed_before_it_is_seen(tmp_path, train_config):
    """Data before the manifest, both before the rename, and then the folder: what a power failure needs."""
    run = tmp_path / "run"
    with Counted(run) as counted:
        checkpoint.save(run, 1, "transformer", train_config, {"model": {"w": torch.ones(3)}}, {"step": 1}, keep=2)
    seen = [line.replace(str(run), "") for line in counted.seen]
    rename = next(i for i, line in enumerate(seen) if line.startswith("rename") and "partial" in line
                  and "json" not in line)  # fmt: skip
    final = [line for line in seen if "/checkpoints/step-0000001/" in line]
    assert not final, f"written under the final name: {final}"
    flushes = sum(line.startswith("fsync") for line in seen[:rename])
    files = list((run / "checkpoints" / "step-0000001").iterdir())
    assert flushes >= len(files) + 1  # every file, and their folder
    assert seen[rename + 1].startswith("fsync")


@pytest.mark.parametrize("name", ["training", "tokenizer training"])
def test_what_was_left_to_do_after_the_last_save_is_done_when_the_run_is_started_again(forked, jobs, tmp_path, name):
    """A run that was killed between its last checkpoint and its end has no step to make: an older checkpoint is
    removed, what was half removed or half written goes, and the status says that it is done."""
    words = [str(word).replace("{out}", str(tmp_path)) for word in jobs[name]]
    assert forked(*words).code == 0
    folder, expected = tmp_path / "run" / "checkpoints", tree(tmp_path)
    newest = checkpoint.newest(tmp_path / "run")
    shutil.copytree(newest, folder / "step-0000001.removed")
    shutil.copytree(newest, folder / "step-0000010.partial")
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("done", "running"))
    assert forked(*words).code == 0
    assert tree(tmp_path) == expected
