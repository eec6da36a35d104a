"""Archives and parquet files as sources: the token set of a folder, from every form of the same images."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_vision.data.folder import ImageFolder
from mutor_vision.data.packed import matching, natural_name
from mutor_vision.data.reading import open_source, source_kind
from mutor_vision.data.tar import TarImages
from mutor_vision.errors import DataError, ImageError, IntegrityError, UserError
from mutor_vision.runtime import Runtime
from mutor_vision.tokenizer.encode import EncodeSettings, encode_folder

ALONE = Runtime(0, 1, torch.device("cpu"), None)
NAMES = ["ant", "bee", "cat", "dog"]


def add(tar, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content) if content else None)


def archive(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return path


def jpeg(number, ending="JPEG"):
    colours = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((20, 16 + number % 5)).save(file, ending)
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    """200 images of four classes, in an order that no form keeps: 'CLASS/NAME' -> bytes."""
    order = np.random.default_rng(0).permutation(200).tolist()
    return {f"{NAMES[n % 7 % 4]}/{n:04d}.jpg": jpeg(n) for n in order}


@pytest.fixture(scope="module")
def forms(files, tmp_path_factory):
    """Name -> what a user writes after --data. All are called 'images', since a manifest says so."""
    root = tmp_path_factory.mktemp("forms")
    for name, content in files.items():
        path = root / "folder" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    archive(root / "tar" / "images.tar", [(f"./{name}", content) for name, content in files.items()])
    for label in NAMES:
        parts = [(name.split("/")[1], content) for name, content in files.items() if name.startswith(label)]
        archive(root / "classes" / "images" / f"{label}.tar", parts)
    samples = list(files.items())
    for shard in range(3):
        members = []
        for name, content in samples[shard::3]:
            label, key = name.removesuffix(".jpg").split("/")
            told = str(NAMES.index(label)).encode() if shard else json.dumps({"label": NAMES.index(label)}).encode()
            members += [(f"{key}.jpg", content), (f"{key}.{'cls' if shard else 'json'}", told)]
        archive(root / "shards" / f"images-{shard:03d}.tar", members)
    (root / "shards" / "classes.txt").write_text("\n".join(NAMES))
    return {
        "folder": root / "folder" / "images", "tar": root / "tar" / "images.tar",
        "classes": f"{root}/classes/images/*.tar", "shards": f"{root}/shards/images-{{000..002}}.tar",
    }  # fmt: skip


def parquet(path, samples, names=(), rows=16):
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = arrow.array([{"bytes": content, "path": name} for name, content, _ in samples],
                        arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))  # fmt: skip
    table = arrow.table({"image": image, "label": arrow.array([label for *_, label in samples], arrow.int64())})
    if names:
        told = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def same_images(source, files):
    assert len(source) == len(files) and list(source.class_names) == NAMES
    found = [f"{source.class_names[label]}" for label in source.labels]
    assert found == sorted(found)
    rng = np.random.default_rng(1)
    names = sorted(files)
    for number in rng.permutation(len(files))[:20]:
        with Image.open(io.BytesIO(files[names[number]])) as image:
            assert source.open(int(number)).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("form", ["tar", "classes", "shards"])
def test_images_are_those_of_the_folder_in_its_order(form, forms, files):
    source, folder = open_source(forms[form]), open_source(forms["folder"])
    assert isinstance(source, TarImages) and isinstance(folder, ImageFolder)
    same_images(source, files)
    assert source.fingerprint() == folder.fingerprint() and source.name == folder.name == "images"
    assert source.fingerprints_of_classes() == folder.fingerprints_of_classes()
    assert len(source.check(range(len(source)))) == 200


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def token_set(tokenizer, data, out, workers=0):
    encode_folder(tokenizer, data, out, EncodeSettings(shard_size=64, views="center"), ALONE, workers=workers)
    return contents(out)


def test_every_form_gives_the_same_bytes(forms, tiny_tokenizer_path, tmp_path):
    sets = {form: token_set(tiny_tokenizer_path, data, tmp_path / form) for form, data in forms.items()}
    for form in ("tar", "classes", "shards"):
        assert sets[form] == sets["folder"], form
    assert {"manifest.json", "codes-00000.npy"} <= sets["folder"].keys()


def test_parquet_gives_the_same_bytes_too(forms, files, tiny_tokenizer_path, tmp_path):
    samples = [(name.split("/")[1], content, NAMES.index(name.split("/")[0])) for name, content in files.items()]
    for part in range(2):
        parquet(tmp_path / "pq" / f"images-{part}.parquet", samples[part::2], NAMES)
    data = f"{tmp_path}/pq/images-*.parquet"
    same_images(open_source(data), files)
    assert token_set(tiny_tokenizer_path, data, tmp_path / "a") == token_set(
        tiny_tokenizer_path, forms["folder"], tmp_path / "b"
    )


def test_workers_read_one_archive_at_once(forms, tiny_tokenizer_path, tmp_path):
    one = token_set(tiny_tokenizer_path, forms["tar"], tmp_path / "one")
    assert one == token_set(tiny_tokenizer_path, forms["tar"], tmp_path / "two", workers=2)


@pytest.mark.parametrize("damage, message", [
    (lambda c, ends: c[: ends[1]], "cut or damaged after member ant/1.jpg"),  # between two members
    (lambda c, ends: c[: ends[1] + 700], "at ant/2.jpg .unexpected end of data"),  # within one
    (lambda c, ends: c[: ends[1] + 100], "cut or damaged after member ant/1.jpg"),  # within a header
    (lambda c, ends: c[: ends[1]] + b"x" * 512 + c[ends[1] + 512 :], "cut or damaged after member ant/1.jpg"),
    (lambda c, ends: b"x" * 2000, "at its beginning"),
    (lambda c, ends: b"", "at its beginning"),
    (lambda c, ends: __import__("gzip").compress(c), "unpack it to .tar"),
], ids=["between", "within", "header", "overwritten", "no tar", "empty", "compressed"])  # fmt: skip
def test_damaged_archives_are_told_with_the_member(damage, message, tmp_path):
    path = archive(tmp_path / "a.tar", [(f"ant/{n}.jpg", jpeg(n)) for n in range(4)])
    with tarfile.open(path) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar]
    path.write_bytes(damage(path.read_bytes(), ends))
    with pytest.raises(IntegrityError, match=message):
        open_source(path)


@pytest.mark.parametrize("name, fields", [
    ("../x.jpg", {}), ("/etc/x.jpg", {}), ("ant/../../x.jpg", {}), ("ant/x.jpg", {"type": tarfile.SYMTYPE}),
    ("ant/x.jpg", {"type": tarfile.LNKTYPE}), ("ant/x.jpg", {"type": tarfile.CHRTYPE}),
    ("ant/x.jpg", {"type": tarfile.FIFOTYPE}),
])  # fmt: skip
@pytest.mark.bad_input("images")
def test_unsafe_members_are_refused_and_nothing_is_written(name, fields, tmp_path):
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        add(tar, "ant/0.jpg", jpeg(0))
        add(tar, name, b"" if fields else jpeg(1), linkname="/etc/passwd", **fields)
    with pytest.raises(IntegrityError, match="x.jpg (would lie outside|is a link)"):
        open_source(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.tar"]


@pytest.mark.parametrize("members, message", [
    ([("0.jpg", 0), ("0.cls", b"0"), ("1.jpg", 1)], "1.jpg has no label"),
    ([("0.jpg", 0), ("0.cls", b"0"), ("1.cls", b"0")], "sample 1 has a label and no image"),
    ([("0.cls", b"0"), ("1.cls", b"0"), ("0.jpg", 0), ("1.jpg", 1)], "sample 0 do not follow one another"),
    ([("0.jpg", 0), ("0.cls", b"cat")], "0.cls holds no label"),
    ([("0.jpg", 0), ("0.json", b'{"label": true}')], "0.json holds no label"),
    ([("0.jpg", 0), ("0.json", b"[" * 100_000)], "0.json holds no label"),
    ([("0.jpg", 0), ("0.cls", b"-1")], "0.cls holds no label"),
    ([("0.jpg", 0), ("0.cls", b"2")], "class '0' of .* has no image"),
    ([("0.jpg", 0), ("0.cls", b"0"), ("0.jpg", 1)], "two images of the name"),
    ([("0.txt", b"0")], "holds no image"),
    ([("0.jpg", 0)], "images without class folders"),
])  # fmt: skip
def test_shards_that_do_not_fit(members, message, tmp_path):
    path = archive(tmp_path / "s.tar", [(n, jpeg(c) if isinstance(c, int) else c) for n, c in members])
    with pytest.raises(
        DataError if "class" in message or "holds no image" in message else IntegrityError, match=message
    ):
        open_source(path)


def test_members_that_could_run_are_not_read(tmp_path):
    members = [("0.jpg", jpeg(0)), ("0.cls", b"0"), ("0.pyd", b"cos\nsystem\n(S'false'\ntR."), ("0.pth", b"x")]
    source = open_source(archive(tmp_path / "s.tar", members))
    assert len(source) == 1 and source.left_out == {".pth": 1, ".pyd": 1}


def test_a_bad_image_is_named_by_archive_and_member(forms, tmp_path):
    path = archive(tmp_path / "a.tar", [("ant/0.jpg", jpeg(0)), ("ant/1.jpg", jpeg(1)[:-40]), ("._x.jpg", b"mac")])
    source = open_source(path)
    assert source.ignored == {".*": 1}
    with pytest.raises(ImageError, match=r"a.tar: ant/1.jpg: not a complete image") as caught:
        source.check(range(2))
    assert source.names_of(caught.value) == ["ant/1.jpg"]
    with pytest.raises(ImageError, match=r"a.tar: ant/1.jpg"):
        source.open(1)


def test_what_a_string_means(tmp_path):
    assert source_kind("a/b.tar") is TarImages and source_kind("a") is None
    (tmp_path / "x.tar").mkdir()
    assert source_kind(tmp_path / "x.tar") is None  # a folder of that name
    for number in (9, 10):
        (tmp_path / f"s-{number:02d}.tar").touch()
    assert [p.name for p in matching(f"{tmp_path}/s-{{09..10}}.tar")] == ["s-09.tar", "s-10.tar"]
    with pytest.raises(DataError, match=r"s-11.tar is no file \(1 of 3 are missing\)"):
        matching(f"{tmp_path}/s-{{09..11}}.tar")
    with pytest.raises(DataError, match="names no file"):
        matching(f"{tmp_path}/t-*.tar")
    assert [natural_name(n) for n in ("a/train-{000..012}.tar", "a/val.tar", "a/t-*.parquet")] == ["train", "val", "t"]


@pytest.mark.parametrize("build, error, message", [
    (lambda p: p.write_bytes(b"PAR1 not"), IntegrityError, "no complete parquet file"),
    (lambda p: p.write_bytes(p.read_bytes()[:-20]), IntegrityError, "no complete parquet file"),
    (lambda p: parquet(p, [("a.jpg", jpeg(0), 1)], ["one"]), DataError, "has the label 1, expected 0 to 0"),
    (lambda p: parquet(p, [("a.jpg", None, 0)]), IntegrityError, "a row without bytes or label"),
])  # fmt: skip
def test_parquet_files_that_do_not_fit(build, error, message, tmp_path):
    path = parquet(tmp_path / "a.parquet", [("a.jpg", jpeg(0), 0)])
    build(path)
    with pytest.raises(error, match=message):
        open_source(path)


def test_without_pyarrow_a_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"parquet files need pyarrow; pip install 'mutor-vision\[parquet\]'"):
        open_source(tmp_path / "a.parquet")
