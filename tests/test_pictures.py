"""Where pictures come from: folders, data sets, what is wrong with them and with who may look at them."""

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from saev_dist import replay
from saev_dist.data.images import EXTENSIONS, Pictures, load_picture, open_pictures
from saev_dist.errors import DataError
from tests.ranks import fails, run_ranks
from tests.replays import N_IMGS, make_pictures, make_replay, make_run, tree


def test_pictures_that_are_not_where_the_metadata_says_are_a_warning(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    monkeypatch.setattr("saev_dist.data.shards._dataset", lambda md: "/elsewhere\n\x1b[2J")
    replay.run(make_replay(run, pictures=False))
    assert "/elsewhere" not in capsys.readouterr().err
    replay.run(make_replay(run, force=True))
    assert r"are in /elsewhere\n\x1b[2J, as its metadata says; there is no such folder here" in capsys.readouterr().err


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def spoil(images: Path, how: str) -> None:
    fpath = min(images.rglob("*.png"))
    match how:
        case "truncated":
            fpath.write_bytes(fpath.read_bytes()[:-500])
        case "text":
            fpath.write_text("this is no picture")
        case "bomb":
            fpath.write_bytes(png_header(60_000, 60_000))
        case "one missing":
            fpath.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", ["000.png cannot be read", "truncated"]),
        ("text", ["000.png is not a picture"]),
        ("bomb", ["000.png would decode to more than"]),
        ("one missing", ["found 22 (class folders) pictures", "have 23 examples"]),
    ],
)
def test_bad_pictures_stop_the_run_with_one_line(tmp_path, capsys, how, words):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    spoil(images, how)
    line = fails(capsys, "replay", "--run", run, "--images", images, "--all", "--n-images", 99, "--workers", 1, "--no-progress")
    for word in words:
        assert word in line
    assert not (run / "visuals").exists()


def test_a_name_of_two_lines_with_escape_sequences_stays_one_line_of_text(tmp_path, capsys):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    first = min(images.rglob("*.png"))
    first.rename(first.with_name("000\n\x1b[31m\u2028.png")).write_text("no picture")
    line = fails(capsys, "replay", "--run", run, "--images", images, "--all", "--n-images", 99, "--workers", 1, "--no-progress")
    assert r"000\n\x1b[31m\u2028.png is not a picture" in line


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png is no file; expected a picture"):
        load_picture(tmp_path, "x.png", in_data_set=False)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\n%%EOF\n"


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The file that a `gs` on the path leaves when it is run."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho ran >> {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "ran"


def save_rows(dpath: Path, stored: list[dict], kinds: dict | None = None, **columns: list) -> Path:
    """A data set whose pictures are stored just so; `datasets` would copy those that are only named, wherever they are."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), **(kinds or {})})
    datasets.Dataset.from_dict({name: [None] for name in features}, features=features).save_to_disk(str(dpath))
    arrow = pyarrow.table({"image": stored, **columns}, schema=features.arrow_schema)
    (fpath,) = dpath.glob("*.arrow")
    with pyarrow.ipc.new_stream(fpath, arrow.schema) as writer:
        writer.write_table(arrow)
    return dpath


def test_a_picture_never_starts_another_program(tmp_path, ran):
    """Pillow hands Encapsulated PostScript, whatever its name, to a `gs` on the path."""
    (tmp_path / "x.png").write_bytes(EPS)
    with pytest.raises(DataError, match=r"x\.png is not a picture"):
        load_picture(tmp_path, "x.png", in_data_set=False)
    assert not ran.exists()


def test_nor_does_a_picture_of_a_data_set_whichever_column_it_stands_in(tmp_path, ran):
    datasets = pytest.importorskip("datasets")
    picture, out = io.BytesIO(), {"bytes": EPS, "path": None}
    Image.new("RGB", (6, 4)).save(picture, "PNG")
    (tmp_path / "x.png").write_bytes(EPS)
    rows = [out, {"bytes": None, "path": str(tmp_path / "x.png")}, {"bytes": picture.getvalue(), "path": "x.eps"}]
    further = {"label": datasets.Image(), "mask": datasets.Image()}
    dpath = save_rows(tmp_path / "set", rows, further, label=[out] * 3, mask=[out] * 3)
    for name in ("0", "1"):
        with pytest.raises(DataError, match=f"set, picture {name} is not a picture that Pillow can read"):
            load_picture(dpath, name, in_data_set=True)
    assert load_picture(dpath, "2", in_data_set=True).size == (6, 4)
    pictures = open_pictures(dpath, 3)
    assert list(pictures.rows()) == [("0", ""), ("1", ""), ("2", "")] and pictures.label(0) == ""
    assert not ran.exists()


def test_what_a_data_set_only_names_is_a_file_here_or_refused(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe")
    paths = [str(tmp_path / "x.png"), str(tmp_path / "pipe"), "http://127.0.0.1:9/x.png", f"zip://x.png::{tmp_path}/x.zip"]
    dpath = save_rows(tmp_path / "set", [{"bytes": None, "path": path} for path in paths])
    assert load_picture(dpath, "0", in_data_set=True).size == (6, 4)
    with pytest.raises(DataError, match=r"set, picture 1 \(.*/pipe\) is no file; expected a picture"):
        load_picture(dpath, "1", in_data_set=True)
    for name in ("2", "3"):
        with pytest.raises(DataError, match=rf"set, picture {name} is not in the data set but at .*, which is no file here"):
            load_picture(dpath, name, in_data_set=True)


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
def test_a_picture_of_a_data_set_is_turned_and_converted_as_datasets_does_it(tmp_path, extension):
    datasets = pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / f"x.{extension}", exif=exif)
    content = (tmp_path / f"x.{extension}").read_bytes()
    features = datasets.Features({"image": datasets.Image(mode="L")})
    rows = datasets.Dataset.from_dict({"image": [content, str(tmp_path / f"x.{extension}")]}, features=features)
    rows.save_to_disk(str(tmp_path / "set"))
    for i in range(2):
        read = load_picture(tmp_path / "set", str(i), in_data_set=True)
        assert read.size == (4, 6) and np.array_equal(read, rows[i]["image"].convert("RGB"))


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow"])
def test_a_data_set_that_was_saved_with_a_format_is_read_as_any_other(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    fpaths = [str(fpath) for fpath in sorted(make_pictures(tmp_path / "images", 3).rglob("*.png"))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": fpaths, "label": [1, 0, None]}, features=features)
    rows.set_format(kind, columns=["label"])
    rows.save_to_disk(str(tmp_path / "set"))
    pictures = open_pictures(tmp_path / "set", 3)
    assert list(pictures.rows()) == [("0", "b"), ("1", "a"), ("2", "")]
    assert [pictures.label(i) for i in range(3)] == ["b", "a", ""]
    assert load_picture(tmp_path / "set", "1", in_data_set=True).size == (60, 40)
    rows.select([1, 0, 2]).save_to_disk(str(tmp_path / "other"))
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert pictures.fingerprint() == open_pictures(tmp_path / "copy", 3).fingerprint()
    assert pictures.fingerprint() != open_pictures(tmp_path / "other", 3).fingerprint()


def test_a_label_is_looked_up_without_a_copy_of_the_data_set(tmp_path, columns, monkeypatch):
    datasets = pytest.importorskip("datasets")
    _, dpath = columns(label=[1] * N_IMGS)
    pictures = open_pictures(dpath, N_IMGS)
    copies = []
    monkeypatch.setattr(datasets.arrow_dataset.copy, "deepcopy", lambda thing, *rest: copies.append(thing) or thing)
    assert {pictures.label(i) for i in range(N_IMGS)} == {"b"} and not copies


@pytest.mark.parametrize(
    ("mode", "extension"),
    [("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "webp"), ("I;16", "png"), ("F", "tif")],
)
def test_pictures_of_every_mode_are_read_as_rgb(tmp_path, mode, extension):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8))
    picture = rgb.convert("L").convert("I").convert("I;16") if mode == "I;16" else rgb.convert(mode)
    picture.save(tmp_path / f"x.{extension}")
    read = load_picture(tmp_path, f"x.{extension}", in_data_set=False)
    assert (read.mode, read.size) == ("RGB", (6, 4))


@pytest.mark.parametrize("extension", [*EXTENSIONS, ".gif"])  # the last in data sets
def test_pictures_of_every_format_are_read(tmp_path, extension):
    Image.new("RGB", (6, 4)).save(tmp_path / f"x{extension}")
    assert load_picture(tmp_path, f"x{extension}", in_data_set=False).size == (6, 4)


def test_want_of_memory_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    def full(*args, **settings):
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    (tmp_path / "x.png").touch()
    with pytest.raises(MemoryError):
        load_picture(tmp_path, "x.png", in_data_set=False)


def test_pictures_are_told_apart_by_their_names_sizes_and_times(tmp_path):
    one, other = (Pictures(root=tmp_path, kind="", names=names, n=2) for names in (("a", "bc"), ("ab", "c")))
    assert one.fingerprint() != other.fingerprint()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    pictures = open_pictures(tmp_path, 2)
    before = pictures.version(0)
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert pictures.version(0) != before == pictures.version(0)[:1] + before[1:] and before[0] > 0


def test_class_folders_come_before_loose_pictures_and_too_many_are_refused(tmp_path):
    for name in ("a.png", "c/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    assert open_pictures(tmp_path, 1).names == ("c/b.png",)
    (tmp_path / "a.png").rename(tmp_path / "c/c.png")
    with pytest.raises(DataError, match=r"found 2 \(class folders\) pictures; the shards have 1 examples"):
        open_pictures(tmp_path, 1)


def test_a_data_set_of_several_splits_is_told_of(tmp_path):
    (tmp_path / "dataset_dict.json").touch()
    with pytest.raises(DataError, match="holds several splits; --images takes one of its folders"):
        open_pictures(tmp_path, 1)


def test_a_damage_that_pillow_does_not_expect_is_told_as_any_other(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "x.tif")
    content = (tmp_path / "x.tif").read_bytes()
    strip = content.index(struct.pack("<HH", 273, 4))  # where the pixels begin: a number, which becomes a text
    (tmp_path / "x.tif").write_bytes(content[: strip + 2] + b"\2" + content[strip + 3 :])
    with pytest.raises(DataError, match=r"x\.tif cannot be read: 'str' object cannot be interpreted as an integer"):
        load_picture(tmp_path, "x.tif", in_data_set=False)


def test_sound_pictures_with_odd_metadata_are_read_without_a_warning(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    content = bytearray((tmp_path / "x.jpg").read_bytes())
    n_tags = content.index(b"Exif\0\0") + 14
    content[n_tags : n_tags + 2] = b"\0\x09"  # of which there is one
    (tmp_path / "x.jpg").write_bytes(content)
    Image.new("P", (6, 4)).save(tmp_path / "x.png", transparency=bytes(8))
    for name in ("x.jpg", "x.png"):
        assert load_picture(tmp_path, name, in_data_set=False).size == (6, 4)


def test_a_rotation_flag_is_left_alone_as_the_writers_loader_leaves_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter when shown
    Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert load_picture(tmp_path, "x.jpg", in_data_set=False).size == (6, 4)


def test_flat_folders_and_data_sets_are_picture_sources(tmp_path):
    datasets = pytest.importorskip("datasets")
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    fpaths = sorted(images.rglob("*.png"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for fpath in fpaths:
        (flat / fpath.name).write_bytes(fpath.read_bytes())
    rows = {"image": [str(fpath) for fpath in fpaths], "label": [int(fpath.parent.name[-1]) for fpath in fpaths]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    found = []
    for source in (images, flat, tmp_path / "set"):
        replay.run(make_replay(run, images=source, all=False, n_features=4))
        found.append({name: digest for name, digest in tree(run / "visuals").items() if name.endswith(".png") and "/" in name})
        labels = pyarrow.parquet.read_table(run / "visuals/images.parquet").column("label").to_pylist()
        expected = {images: [fpath.parent.name for fpath in fpaths], flat: [""] * N_IMGS}
        assert labels == expected.get(source, ["abc"[label] for label in rows["label"]])
    assert found[0] == found[1] == found[2] and found[0]


def test_names_that_count_otherwise_than_they_are_sorted_are_told_of(tmp_path, capsys):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    for folder, name, n in (("padded", "{:03d}.png", N_IMGS), ("counted", "img{}.png", N_IMGS), ("few", "img{}.png", 9)):
        (tmp_path / folder).mkdir()
        for i, fpath in enumerate(sorted(images.rglob("*.png"))[:n]):
            shutil.copy(fpath, tmp_path / folder / name.format(i))
    capsys.readouterr()
    replay.run(make_replay(run, images=tmp_path / "padded", all=False, n_features=1))
    assert "the order of" not in capsys.readouterr().err
    replay.run(make_replay(run, images=tmp_path / "counted", all=False, n_features=1))
    said = "warning: {}: pictures go by the order of their names, so image 2 is img10.png, and not img2.png. If the shards"
    assert said.format(tmp_path / "counted") in capsys.readouterr().err
    assert open_pictures(tmp_path / "few", 9).out_of_number() is None
    (tmp_path / "classes").mkdir()
    (tmp_path / "counted").rename(tmp_path / "classes/one")
    assert open_pictures(tmp_path / "classes", N_IMGS).out_of_number() is None  # torchvision's order


NO_CAPABILITIES = """
import ctypes
libc, version_and_pid, none = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS: nor do the drawing processes get them back
assert libc.capset(version_and_pid, none) == 0
"""
"""Root is bound by permissions as everybody else; capabilities(7)."""


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("run", "run/manifest.json: cannot read: Permission denied; make it readable"),
        ("images", "cannot list the images (Permission denied)"),
        ("images/class1", "class1: cannot list the images (Permission denied)"),
        ("images/class1/010.png", "010.png cannot be read: Permission denied"),
        ("sae.pt", "sae.pt: Permission denied; an SAE should be there"),
        ("run/visuals/replay.json", ""),  # of a gallery that is replaced
    ],
)
def test_what_one_may_not_look_at_is_named(tmp_path, closed, words):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    (run / "visuals").mkdir()
    (run / "visuals/replay.json").touch()
    (tmp_path / closed).chmod(0)
    done = run_ranks("replay", "--run", run, "--images", images, "--all", "--n-images", 99, before=NO_CAPABILITIES)
    (tmp_path / closed).chmod(0o755)  # so that pytest can remove it
    if not words:
        assert done.returncode == 0 and (run / "visuals/index.html").exists(), done.stderr
        return
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


@pytest.fixture
def columns(tmp_path, capsys):
    """Writes a data set of these columns over the pictures of `make_pictures`."""
    datasets = pytest.importorskip("datasets")
    fpaths = [str(fpath) for fpath in sorted(make_pictures(tmp_path / "images").rglob("*.png"))]

    def save(name="set", image=None, label=None):
        rows = {"image": image or fpaths} | ({"label": label} if label else {})
        kinds = {"image": datasets.Value("string") if image == fpaths else datasets.Image()}
        kinds |= {"label": datasets.ClassLabel(names=["a", "b"])} if label else {}
        datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(str(tmp_path / name))
        capsys.readouterr()  # its progress
        return fpaths, tmp_path / name

    return save


def test_a_class_that_the_names_do_not_reach_is_its_number(tmp_path, columns):
    run = make_run(tmp_path)
    fpaths, _ = columns()
    _, source = columns(name="classes", label=[i % 2 for i in range(len(fpaths))])
    info = source / "dataset_info.json"
    info.write_text(info.read_text().replace('"b"', "").replace('"a",', '"a"'))
    replay.run(make_replay(run, images=source, all=False, n_features=4))
    labels = pyarrow.parquet.read_table(run / "visuals/images.parquet").column("label").to_pylist()
    assert labels == ["a1"[i % 2] for i in range(len(fpaths))]


@pytest.mark.parametrize("missing", [-1, None])
def test_rows_of_a_data_set_without_a_class_have_no_label(tmp_path, columns, missing):
    """The test splits of public data sets have -1 everywhere."""
    _, dpath = columns(label=[missing, 1] + [missing] * (N_IMGS - 2))
    run = make_run(tmp_path)
    replay.run(make_replay(run, images=dpath, patch_size=5))
    labels = pyarrow.parquet.read_table(run / "visuals/images.parquet").column("label").to_pylist()
    assert labels == ["", "b"] + [""] * (N_IMGS - 2)


def test_data_sets_without_pictures_are_refused_with_one_line(tmp_path, capsys, columns):
    run = make_run(tmp_path)
    flags = ("--all", "--n-images", 99, "--workers", 1, "--no-progress")
    fpaths, whole = columns("whole")
    _, gap = columns("gap", image=[None, *fpaths[1:]])
    _, texts = columns("texts", image=fpaths)
    (whole / "state.json").write_text("[]")
    for dpath, words in (
        (whole, "is no data set that `datasets` can read: TypeError"),
        (gap, "picture 0 is not there: the row has no picture"),
        (texts, "image (Value); expected one named image, of kind Image"),
    ):
        assert words in fails(capsys, "replay", "--run", run, "--images", dpath, *flags)
