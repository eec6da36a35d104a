import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from mutor_vision.data import reading
from mutor_vision.data.folder import ImageFolder, batched, check_apart
from mutor_vision.data.images import center_flip
from mutor_vision.data.reading import TrainingCrops, Views, read_batches
from mutor_vision.errors import DataError, UserError


def write(path, shade=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path)


@pytest.fixture
def root(tmp_path):
    """Two classes of 3 and 2 images whose red is 10 times their place in the listing."""
    for shade, name in enumerate(["bee/2.png", "bee/B.PNG", "bee/a.jpeg", "wasp/0.webp", "wasp/deep/er/1.jpg"]):
        write(tmp_path / "images" / name, 10 * shade)
    return tmp_path / "images"


def test_classes_and_images_are_listed_in_order(root):
    folder = ImageFolder(root)
    assert folder.paths == ["bee/2.png", "bee/B.PNG", "bee/a.jpeg", "wasp/0.webp", "wasp/deep/er/1.jpg"]
    assert folder.labels == [0, 0, 0, 1, 1]
    assert folder.class_names == ["bee", "wasp"]
    assert (len(folder), folder.counts()) == (5, [3, 2])


def test_the_listing_is_torchvisions(root):
    from torchvision.datasets import ImageFolder as Reference

    reference, folder = Reference(str(root)), ImageFolder(root)
    assert [
        (str(root / path), label) for path, label in zip(folder.paths, folder.labels, strict=True)
    ] == reference.imgs
    assert folder.class_names == reference.classes


def test_hidden_names_and_other_files_are_ignored(root):
    before = ImageFolder(root)
    write(root / ".ipynb_checkpoints" / "x.png")
    write(root / "bee" / ".thumbnails" / "x.png")
    write(root / "bee" / "._2.png")
    (root / "bee" / "notes.txt").write_text("no image")
    write(root / "loose.png")
    after = ImageFolder(root)
    assert (after.paths, after.labels, after.class_names) == (before.paths, before.labels, before.class_names)


def test_the_fingerprint_is_of_names_and_sizes(root):
    before = ImageFolder(root).fingerprint()
    assert ImageFolder(root).fingerprint() == before
    (root / "bee" / "2.png").rename(root / "bee" / "3.png")
    renamed = ImageFolder(root).fingerprint()
    write(root / "bee" / "3.png", size=(90, 70))
    assert len({before, renamed, ImageFolder(root).fingerprint()}) == 3


@pytest.mark.bad_input("images")
def test_folders_that_cannot_be_used_say_why(root, tmp_path):
    with pytest.raises(DataError, match=f"does not exist; the nearest folder that does is {root}"):
        ImageFolder(root / "gone" / "deeper")
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(DataError, match="an archive: extract it first"):
        ImageFolder(tmp_path / "train.tar")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="a file, expected a folder"):
        ImageFolder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders; expected one sub-folder"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(DataError, match="images directly in it and no class folders"):
        ImageFolder(root / "wasp" / "deep" / "er")
    (tmp_path / "empty" / "class").mkdir()
    with pytest.raises(DataError, match="holds no image; expected files ending in .jpg"):
        ImageFolder(tmp_path / "empty")
    (root / "hornet").mkdir()
    with pytest.raises(DataError, match="class folder .*hornet holds no image"):
        ImageFolder(root)


@pytest.mark.bad_input("images")
def test_broken_links_pipes_and_loops_are_named(root):
    (root / "bee" / "link.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match="link.png is a broken link"):
        ImageFolder(root)
    (root / "bee" / "link.png").unlink()
    os.mkfifo(root / "bee" / "pipe.png")
    with pytest.raises(DataError, match="pipe.png is not a regular file"):
        ImageFolder(root)
    (root / "bee" / "pipe.png").unlink()
    (root / "bee" / "loop").symlink_to(root)
    with pytest.raises(DataError, match="loop is a link to a folder that contains it"):
        ImageFolder(root)


def shades(images):
    return (images[:, 0, 0, 0].double() / 10).round().long().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_every_training_image_once_and_k_says_which(root, workers):
    indices = np.array([0, 1, 3, 4])
    crops = TrainingCrops(ImageFolder(root), indices, 16, seed=3, min_scale=0.8)
    positions = [range(k, k + 4) for k in range(0, 12, 4)]
    epochs = [shades(batch) for batch in read_batches(crops, positions, workers)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 3, 4]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    late = next(iter(read_batches(crops, [[9, 5]], 0)))
    assert shades(late) == [epochs[2][1], epochs[1][1]]


def test_a_crop_depends_on_k_and_seed_alone(root):
    pixels = np.random.default_rng(0).integers(255, size=(40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "bee" / "2.png")
    folder, only = ImageFolder(root), np.array([0])
    crops = TrainingCrops(folder, only, 16, seed=3, min_scale=0.5)
    again = TrainingCrops(folder, only, 16, seed=3, min_scale=0.5)
    assert all(np.array_equal(crops[k], again[k]) for k in (5, 0, 9, 5))
    assert not np.array_equal(crops[0], crops[1])
    other = TrainingCrops(folder, only, 16, seed=4, min_scale=0.5)
    assert not np.array_equal(crops[0], other[0])
    centre = TrainingCrops(folder, only, 16, seed=3, min_scale=1.0)
    assert np.array_equal(centre[0], centre[7])


def test_views_are_stacked(root):
    views = Views(ImageFolder(root), 16, center_flip)
    assert views[4].shape == (2, 3, 16, 16)
    assert [len(part) for part in batched(range(10), 4)] == [4, 4, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_clear_line_wherever_it_was_read(root, workers):
    (root / "bee" / "2.png").write_text("<html>404</html>")
    views = Views(ImageFolder(root), 16, center_flip)
    with pytest.raises(DataError, match="bee/2.png: not a complete image") as raised:
        list(read_batches(views, [[3, 4], [1, 0]], workers))
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)


class Batches(Dataset):
    """Images of 3 x 64 x 64, all of the colour `index`; `at` runs before each."""

    def __init__(self, at=lambda index: None):
        self.at = at

    def __getitem__(self, index):
        self.at(index)
        return torch.full((3, 64, 64), index, dtype=torch.uint8)


def test_a_full_shared_memory_does_not_stop_the_workers(monkeypatch):
    """In a container /dev/shm has 64 MB. The refusal is torch's own, made in the forked workers."""

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    batches = list(read_batches(Batches(), [range(i, i + 4) for i in range(0, 12, 4)], 2))
    assert torch.equal(torch.cat(batches)[:, 0, 0, 0], torch.arange(12).byte())


SMALL_SHM = """
import time
from pathlib import Path
from mutor_vision.data.folder import ImageFolder
from mutor_vision.data.reading import Views, read_batches
from mutor_vision.data.images import center_flip
views = Views(ImageFolder("{root}"), 512, center_flip)
print(sum(len(batch) for batch in read_batches(views, [[0, 1, 2], [3, 4], [0, 1, 2, 3, 4]], 2)), "images")
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts a small /dev/shm: needs root")
def test_workers_deliver_with_a_dev_shm_of_one_megabyte(root):
    script = (
        f"mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec {sys.executable} -c '{SMALL_SHM.format(root=root)}'"
    )
    result = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, timeout=120)
    if result.returncode in (1, 77) and "10 images" not in result.stdout and "permitted" in result.stderr:
        pytest.skip("mounting is not permitted here")
    assert "10 images" in result.stdout, result.stderr


def killed(index):
    if index == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="the processes that read images failed: .*--workers 0") as raised:
        list(read_batches(Batches(killed), [[i] for i in range(12)], 2))
    assert "\n" not in str(raised.value)


def test_a_worker_that_dies_between_two_reads_is_heard_of_at_the_next():
    """torch would raise in whatever the main thread does at that moment, such as writing a shard."""
    before = set(torch.multiprocessing.active_children())
    stream = read_batches(Batches(lambda index: None), [[i] for i in range(40)], 1)
    next(stream)
    (worker,) = set(torch.multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # the signal has come, and nobody has waited for it
    worker.join()  # as starting another process does
    with pytest.raises(UserError, match="the processes that read images failed"):
        list(stream)


def test_no_worker_is_waited_for_without_an_end(monkeypatch):
    monkeypatch.setattr(reading, "PATIENCE", 2)
    begun = time.monotonic()
    with pytest.raises(UserError, match="timed out after 2 seconds.*--workers 0"):
        list(read_batches(Batches(lambda index: time.sleep(20)), [[0], [1]], 1))
    assert time.monotonic() - begun < 15


def test_workers_that_cannot_be_started_are_one_line(monkeypatch):
    def none():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.multiprocessing, "Queue", none)
    with pytest.raises(UserError, match="2 reading processes cannot be started .*--workers 0"):
        list(read_batches(Batches(), [[0]], 2))
    assert len(list(read_batches(Batches(), [[0]], 0))) == 1


def test_results_stay_out_of_the_images(root, tmp_path):
    for out in (root, root / "run", tmp_path):
        with pytest.raises(UserError, match="lie in one another"):
            check_apart(root, out)
    check_apart(root, tmp_path / "run")
    check_apart(root, tmp_path / "images-run")
