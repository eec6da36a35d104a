import os

import numpy as np
import pytest
from PIL import Image

from mutor_vision.errors import DataError, UserError
from mutor_vision.image_folder import ImageFolder, TrainingCrops, Views, batched, check_apart, read_batches
from mutor_vision.images import center_flip


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
    folder = ImageFolder.open(root)
    assert folder.paths == ["bee/2.png", "bee/B.PNG", "bee/a.jpeg", "wasp/0.webp", "wasp/deep/er/1.jpg"]
    assert folder.labels == [0, 0, 0, 1, 1]
    assert folder.class_names == ["bee", "wasp"]
    assert (len(folder), folder.counts()) == (5, [3, 2])


def test_the_listing_is_torchvisions(root):
    from torchvision.datasets import ImageFolder as Reference

    reference, folder = Reference(str(root)), ImageFolder.open(root)
    assert [
        (str(root / path), label) for path, label in zip(folder.paths, folder.labels, strict=True)
    ] == reference.imgs
    assert folder.class_names == reference.classes


def test_hidden_names_and_other_files_are_ignored(root):
    before = ImageFolder.open(root)
    write(root / ".ipynb_checkpoints" / "x.png")
    write(root / "bee" / ".thumbnails" / "x.png")
    write(root / "bee" / "._2.png")
    (root / "bee" / "notes.txt").write_text("no image")
    write(root / "loose.png")
    assert ImageFolder.open(root) == before


def test_the_fingerprint_is_of_names_and_sizes(root):
    before = ImageFolder.open(root).fingerprint()
    assert ImageFolder.open(root).fingerprint() == before
    (root / "bee" / "2.png").rename(root / "bee" / "3.png")
    renamed = ImageFolder.open(root).fingerprint()
    write(root / "bee" / "3.png", size=(90, 70))
    assert len({before, renamed, ImageFolder.open(root).fingerprint()}) == 3


def test_folders_that_cannot_be_used_say_why(root, tmp_path):
    with pytest.raises(DataError, match=f"does not exist; the nearest folder that does is {root}"):
        ImageFolder.open(root / "gone" / "deeper")
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(DataError, match="an archive: extract it first"):
        ImageFolder.open(tmp_path / "train.tar")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="a file, expected a folder"):
        ImageFolder.open(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders; expected one sub-folder"):
        ImageFolder.open(tmp_path / "empty")
    with pytest.raises(DataError, match="images directly in it and no class folders"):
        ImageFolder.open(root / "wasp" / "deep" / "er")
    (tmp_path / "empty" / "class").mkdir()
    with pytest.raises(DataError, match="holds no image; expected files ending in .jpg"):
        ImageFolder.open(tmp_path / "empty")
    (root / "hornet").mkdir()
    with pytest.raises(DataError, match="class folder .*hornet holds no image"):
        ImageFolder.open(root)


def test_broken_links_pipes_and_loops_are_named(root):
    (root / "bee" / "link.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match="link.png is a broken link"):
        ImageFolder.open(root)
    (root / "bee" / "link.png").unlink()
    os.mkfifo(root / "bee" / "pipe.png")
    with pytest.raises(DataError, match="pipe.png is not a regular file"):
        ImageFolder.open(root)
    (root / "bee" / "pipe.png").unlink()
    (root / "bee" / "loop").symlink_to(root)
    with pytest.raises(DataError, match="loop is a link to a folder that contains it"):
        ImageFolder.open(root)


def shades(images):
    return (images[:, 0, 0, 0].double() / 10).round().long().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_every_training_image_once_and_k_says_which(root, workers):
    indices = np.array([0, 1, 3, 4])
    crops = TrainingCrops(ImageFolder.open(root), indices, 16, seed=3, min_scale=0.8)
    positions = [range(k, k + 4) for k in range(0, 12, 4)]
    epochs = [shades(batch) for batch in read_batches(crops, positions, workers)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 3, 4]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    late = next(iter(read_batches(crops, [[9, 5]], 0)))
    assert shades(late) == [epochs[2][1], epochs[1][1]]


def test_a_crop_depends_on_k_and_seed_alone(root):
    pixels = np.random.default_rng(0).integers(255, size=(40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "bee" / "2.png")
    folder, only = ImageFolder.open(root), np.array([0])
    crops = TrainingCrops(folder, only, 16, seed=3, min_scale=0.5)
    again = TrainingCrops(folder, only, 16, seed=3, min_scale=0.5)
    assert all(np.array_equal(crops[k], again[k]) for k in (5, 0, 9, 5))
    assert not np.array_equal(crops[0], crops[1])
    other = TrainingCrops(folder, only, 16, seed=4, min_scale=0.5)
    assert not np.array_equal(crops[0], other[0])
    centre = TrainingCrops(folder, only, 16, seed=3, min_scale=1.0)
    assert np.array_equal(centre[0], centre[7])


def test_views_are_stacked(root):
    views = Views(ImageFolder.open(root), 16, center_flip)
    assert views[4].shape == (2, 3, 16, 16)
    assert [len(part) for part in batched(range(10), 4)] == [4, 4, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_clear_line_wherever_it_was_read(root, workers):
    (root / "bee" / "2.png").write_text("<html>404</html>")
    views = Views(ImageFolder.open(root), 16, center_flip)
    with pytest.raises(DataError, match="bee/2.png: not a complete image") as raised:
        list(read_batches(views, [[3, 4], [1, 0]], workers))
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)


def test_results_stay_out_of_the_images(root, tmp_path):
    for out in (root, root / "run", tmp_path):
        with pytest.raises(UserError, match="lie in one another"):
            check_apart(root, out)
    check_apart(root, tmp_path / "run")
    check_apart(root, tmp_path / "images-run")
