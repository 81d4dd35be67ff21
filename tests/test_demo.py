"""The demo, small: a few steps of training, then everything else as it is."""

import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from saev_dist import demo
from saev_dist.config import Demo
from saev_dist.data.images import list_images
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError, Preempted, RunError
from saev_dist.sae.saev import load_saev

pytest.importorskip("skimage")

N_STEPS = 60


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo; tests read it only."""
    dpath = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "N_IN_GALLERY", 6)  # beside the sheet's
        demo.run(Demo(out=dpath, n_steps=N_STEPS, progress=False))
    return dpath


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of two photographs and one feature in the gallery: quickly."""
    monkeypatch.setattr(demo, "PHOTOGRAPHS", dict(list(demo.PHOTOGRAPHS.items())[:2]))
    monkeypatch.setattr(demo, "N_IN_GALLERY", 1)


def acts_of(out: Path) -> np.ndarray:
    """The stored activations (images, patches, d_model), read by name and size alone."""
    entries = json.loads((out / "shards" / "shards.json").read_text())
    flat = np.concatenate([np.fromfile(out / "shards" / entry["name"], "<f4") for entry in entries])
    shards = Shards.open(out / "shards")
    return flat.reshape(shards.n_examples, shards.n_patches, shards.d_model)


def test_there_is_an_image_folder_of_several_hundred_crops(out: Path) -> None:
    fpaths = list_images(out / "images")
    assert len(fpaths) >= 300
    assert {fpath.parent.name for fpath in fpaths} == {Path(name).stem for name in demo.PHOTOGRAPHS}
    with Image.open(fpaths[0]) as crop:
        assert crop.size == (96, 96) and crop.mode == "RGB"


def test_shards_hold_a_row_major_grid_of_finite_activations_for_each_image(out: Path) -> None:
    shards = Shards.open(out / "shards")
    shards.check_files()
    assert shards.n_examples == len(list_images(out / "images"))
    assert shards.n_patches == 12 * 12 and shards.d_model == load_saev(out / "sae.pt").d_model
    assert np.isfinite(acts_of(out)).all()


def test_an_activation_depends_on_the_pixels_around_its_patch_only() -> None:
    crops_ehwc = np.random.default_rng(0).integers(256, size=(3, 96, 96, 3), dtype=np.uint8)
    crops_ehwc[0] = 0
    crops_ehwc[0, 32:40, 64:72] = 255  # patch row 4, column 8: the patches around it see it too, with their margin
    acts_pd = demo.embed(crops_ehwc)[0]
    seen_rc = (acts_pd - acts_pd[0]).abs().amax(1).reshape(12, 12) > 1e-3
    assert {tuple(place) for place in seen_rc.nonzero().tolist()} == {(r, c) for r in (3, 4, 5) for c in (7, 8, 9)}


def test_slots_are_the_brute_force_best_images_of_each_feature(out: Path) -> None:
    sae = load_saev(out / "sae.pt")
    acts_epd = torch.from_numpy(acts_of(out))
    h_eps = acts_epd @ sae.w_enc_ds + sae.b_enc_s
    values, features = h_eps.topk(demo.TOP_K, dim=2)
    codes_eps = torch.zeros_like(h_eps).scatter(2, features, values)
    best_se = codes_eps.amax(1).T
    top_values_sk, top_img_i_sk, top_patch_i_sk = (
        torch.load(out / "run" / f"{stem}.pt", weights_only=True) for stem in ("top_values", "top_img_i", "top_patch_i")
    )
    filled = top_img_i_sk >= 0
    assert filled.any()
    expected_sk = best_se.sort(dim=1, descending=True).values[:, : top_values_sk.shape[1]]
    assert torch.equal(filled, expected_sk > 0)
    # Which code is a token's fourth can turn on the last bit of a product, and these are not the encoder's shapes.
    close = torch.isclose(top_values_sk[filled], expected_sk[filled], rtol=1e-4, atol=1e-4)
    assert (~close).sum() <= 10
    n_wrong = 0
    for s, k in filled.nonzero()[:: max(1, int(filled.sum()) // 500)].tolist():
        code = codes_eps[top_img_i_sk[s, k], top_patch_i_sk[s, k], s]
        n_wrong += not torch.isclose(code, top_values_sk[s, k], rtol=1e-4, atol=1e-4)
    assert n_wrong <= 1


def test_training_lowers_the_error(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    acts_bd = torch.randn(2000, 8, generator=random) @ torch.randn(8, demo.D_MODEL, generator=random)

    def error(n_steps: int) -> float:
        demo.train(acts_bd, tmp_path / "sae.pt", Demo(n_steps=n_steps, progress=False))
        sae = load_saev(tmp_path / "sae.pt")
        values, features = (acts_bd @ sae.w_enc_ds + sae.b_enc_s).topk(demo.TOP_K, dim=1)
        codes_bs = torch.zeros(len(acts_bd), sae.d_sae).scatter(1, features, values)
        return float((acts_bd - codes_bs @ sae.w_dec_sd - sae.b_dec_d).square().mean() / acts_bd.var())

    assert error(80) < 0.8 * error(1)


def test_a_seed_gives_the_same_weights(tmp_path: Path) -> None:
    acts_bd = torch.randn(3000, demo.D_MODEL, generator=torch.Generator().manual_seed(1))
    first, second = tmp_path / "1.pt", tmp_path / "2.pt"
    for fpath in (first, second):
        demo.train(acts_bd, fpath, Demo(n_steps=5, progress=False))
    assert first.read_bytes() == second.read_bytes()


def test_the_sheet_has_rows(out: Path) -> None:
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 500


def test_a_finished_demo_is_left_as_it_is(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {fpath: fpath.stat().st_mtime_ns for fpath in out.rglob("*") if fpath.is_file()}
    demo.run(Demo(out=out, n_steps=N_STEPS, progress=False))
    assert {fpath: fpath.stat().st_mtime_ns for fpath in out.rglob("*") if fpath.is_file()} == before
    assert "index.html" in capsys.readouterr().out


def test_a_directory_of_the_user_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not a demo's"):
        demo.run(Demo(out=tmp_path, force=True, progress=False))
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_demo_that_is_told_to_leave_says_that_it_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*args: object) -> None:
        raise Preempted("SIGTERM: stopped. Run the same command again, on any number of ranks, to continue.")

    monkeypatch.setattr(demo, "cut", leave)
    with pytest.raises(Preempted, match=r"^the demo was stopped by a signal; run it again, and it starts over\.$"):
        demo.run(Demo(out=tmp_path / "out", progress=False))


def test_a_sheet_that_is_written_in_part_marks_no_finished_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die_half_way(image: Image.Image, to: Path | BinaryIO, **settings: str) -> None:
        if isinstance(to, Path):  # of an image
            return save(image, to, **settings)
        to.write(b"half")
        raise ZeroDivisionError

    make_small(monkeypatch)
    save = Image.Image.save
    for job in ("train", "extract.run", "replay.run"):
        monkeypatch.setattr(f"saev_dist.demo.{job}", lambda *_: None)
    monkeypatch.setattr(demo, "choose_rows", lambda *_: ([0], [[]]))
    monkeypatch.setattr(demo, "contact_sheet", lambda *_: np.zeros((4, 4, 3), np.uint8))
    with monkeypatch.context() as dying:
        dying.setattr(Image.Image, "save", die_half_way)
        with pytest.raises(ZeroDivisionError):
            demo.run(Demo(out=tmp_path, progress=False))
    assert not (tmp_path / "contact-sheet.png").exists()
    demo.run(Demo(out=tmp_path, progress=False))
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.format == "PNG"


def test_a_missing_scikit_image_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install scikit-image\."):
        demo.run(Demo(out=tmp_path / "out", progress=False))
    assert not (tmp_path / "out").exists()


def test_a_scikit_image_without_a_photograph_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PHOTOGRAPHS", demo.PHOTOGRAPHS | {"of-the-future.png": 1.0})
    with pytest.raises(ConfigError, match=r"of-the-future\.png is not part of this scikit-image"):
        demo.run(Demo(out=tmp_path / "out", progress=False))
    assert not (tmp_path / "out").exists()


def test_a_photograph_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "photographs_dpath", lambda: tmp_path)
    monkeypatch.setattr(demo, "PHOTOGRAPHS", {"a.png": 1.0})
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"a\.png: cannot identify image file .* Install scikit-image again"):
        demo.run(Demo(out=tmp_path / "out", progress=False))


def test_force_removes_nothing_that_the_user_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    out = tmp_path / "out"
    demo.run(Demo(out=out, n_steps=2, progress=False))
    mine = out / "shards" / "notes.json"
    mine.write_text("mine")
    demo.run(Demo(out=out, n_steps=3, force=True, progress=False))
    assert mine.read_text() == "mine"


def test_an_image_of_the_user_among_the_crops_is_an_error_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    out = tmp_path / "out"
    demo.run(Demo(out=out, n_steps=2, progress=False))
    mine = out / "images" / "mine" / "holiday.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(RunError, match=r"holiday.png is not an image of the demo"):
        demo.run(Demo(out=out, n_steps=2, force=True, progress=False))
    assert mine.read_bytes() == b"mine"


def test_other_settings_need_force(out: Path) -> None:
    with pytest.raises(RunError, match="--force"):
        demo.run(Demo(out=out, n_steps=N_STEPS + 1, progress=False))
