"""What is under way between the disk and the accumulators: enough for every thread, no more than there are buffers for."""

import json
import time
from collections import defaultdict
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saev_dist import estimate, job
from saev_dist.accumulators import reconstruction
from saev_dist.cli import main
from saev_dist.config import Extract
from saev_dist.data.reader import Reader
from saev_dist.data.shards import Shards
from saev_dist.errors import DataError
from saev_dist.extract import Clock, _encoded, run
from saev_dist.sae import pieces
from saev_dist.sae.encoder import Encoder
from saev_dist.sae.model import Relu, Sae, Threshold
from saev_dist.sae.pieces import batches_ahead
from saev_dist.sae.sieve import Sieve
from tests.crash import wait_for
from tests.ranks import artifact_hashes
from tests.synthetic import RELU, make_acts, make_sae, make_shards

CPU = torch.device("cpu")


def threads_of(run: Path) -> int:
    """How many encoded, as its manifest has it."""
    return json.loads((run / "manifest.json").read_text())["machine"]["n_threads"]


class Piece:
    """A future."""

    def __init__(self, encoder: "Fake", *, is_done: bool) -> None:
        self.encoder, self.is_done = encoder, is_done

    def done(self) -> bool:
        return self.is_done

    def result(self) -> "Piece":
        self.encoder.n_handed_over += 1
        return self


class Fake:
    """An encoder whose pieces are one image."""

    def __init__(self, n_threads: int, *, is_done: bool) -> None:
        self.n_threads, self.is_done = n_threads, is_done
        self.n_begun = self.n_handed_over = 0

    def submit_batch(self, acts_bd, *, img_i, n_patches):
        n_imgs = len(acts_bd) // n_patches
        self.n_begun += n_imgs
        return [Piece(self, is_done=self.is_done) for _ in range(n_imgs)]


class Batches:
    """A reader of batches of so many images; None stands for one that cannot be read."""

    def __init__(self, sizes, *, is_ready: bool = True) -> None:
        self.sizes, self.is_ready, self.n_read = sizes, is_ready, 0

    def __iter__(self):
        for n_imgs in self.sizes:
            if n_imgs is None:
                raise DataError("bad")
            self.n_read += 1
            yield SimpleNamespace(img_i=0, n_examples=n_imgs), torch.zeros(n_imgs * 5, 3)


SHARDS = SimpleNamespace(n_patches=5)
SIZES = {
    "a small batch at the end of each shard": [6, 1] * 20,
    "small shards among big ones": [6] * 5 + [1] * 40 + [6] * 5,
    "one image": [1] * 30,
    "equal": [6] * 9,
    "few": [6, 2],
}


@pytest.mark.parametrize("n_threads", [1, 2, 6, 64])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_thread_has_a_piece_and_no_more_batches_are_held_than_are_stated(monkeypatch, sizes, n_threads):
    monkeypatch.setattr(pieces, "BLOCK_TOKENS", 5)  # a piece is one image
    counts = {n: sizes.count(n) for n in set(sizes)}
    n_ahead = batches_ahead(counts, 5, Relu(), 24, CPU, n_threads)
    encoder, reader, n_done = Fake(n_threads, is_done=False), Batches(sizes), 0
    for batch, codes in _encoded(reader, encoder, SHARDS, n_ahead, Clock()):
        n_done += 1
        assert len(codes) == batch.n_examples
        n_behind, n_held = encoder.n_begun - encoder.n_handed_over, reader.n_read - n_done
        assert n_held <= n_ahead
        if reader.n_read < len(sizes):
            assert n_behind >= n_threads or n_held == n_ahead
            assert n_behind < n_threads + 6, "more is of no use"
            if sizes == SIZES["a small batch at the end of each shard"]:
                assert n_behind >= n_threads
    assert n_done == len(sizes)


def test_a_batch_that_is_encoded_does_not_wait_for_a_slow_disk():
    reader = Batches([2] * 9, is_ready=False)
    for n_done, _ in enumerate(_encoded(reader, Fake(2, is_done=True), SHARDS, 5, Clock()), 1):
        assert reader.n_read == n_done
    assert n_done == 9


@pytest.mark.parametrize("n_ahead", [1, 2, 5])
def test_what_was_read_before_an_error_is_handed_over(n_ahead):
    stream = _encoded(Batches([1, 1, 1, 1, None, 1]), Fake(9, is_done=False), SHARDS, n_ahead, Clock())
    assert [batch.n_examples for batch, _ in (next(stream) for _ in range(4))] == [1] * 4
    with pytest.raises(DataError, match="bad"):
        next(stream)


def test_a_failed_read_loses_no_batch(tmp_path, monkeypatch, capsys):
    """Of what comes before it, all is kept."""
    shards, sae = make_shards(tmp_path / "shards", make_acts(9), imgs_per_shard=1), make_sae(tmp_path / "sae.pt")
    cfg = Extract(
        shards=shards, sae=sae, out=tmp_path / "run", batch_tokens=1, self_check="off", progress=False, snapshot_every=1e9
    )
    bad = Shards.open(shards)
    fpath = shards / bad.names[6]
    content, read = fpath.read_bytes(), Reader.__iter__

    def read_and_cut(reader):
        for i, (batch, acts_bd) in enumerate(read(reader)):
            if i == 0:
                fpath.write_bytes(content[:-4])
            yield batch, acts_bd

    monkeypatch.setattr(job, "batch_threads", lambda device: 4)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "__iter__", read_and_cut)
        with pytest.raises(DataError, match=bad.names[6]):
            run(cfg)
    fpath.write_bytes(content)
    run(cfg)
    assert "holds 6 of 9 images" in capsys.readouterr().out
    assert threads_of(tmp_path / "run") == 4


def test_activations_stay_until_their_codes_are_used(tmp_path, monkeypatch):
    """Every other image takes longer to encode than its successors take to be read. The decoder is read in parts, as a large one."""
    monkeypatch.setattr(reconstruction, "PART_BYTES", 64)
    monkeypatch.setattr(reconstruction, "CODES_IN_PART", 1)
    acts = np.random.default_rng(0).normal(size=(40, 5, 6)).astype(np.float32)
    shards, sae = make_shards(tmp_path / "shards", acts), make_sae(tmp_path / "sae.pt", RELU)
    cfg = Extract(
        shards=shards, sae=sae, out=tmp_path / "plain", batch_tokens=1, self_check="off", progress=False, metrics=True
    )
    run(cfg)
    encode = Encoder._encode

    def wait_and_encode(self, acts_bd, img_i, *args):
        time.sleep(0.05 * (img_i % 2))
        return encode(self, acts_bd, img_i, *args)

    monkeypatch.setattr(Encoder, "_encode", wait_and_encode)
    monkeypatch.setattr(job, "batch_threads", lambda device: 6)
    run(Extract(**vars(cfg) | {"out": tmp_path / "slow", "read_ahead": 1}))
    assert threads_of(tmp_path / "slow") == 6
    assert artifact_hashes(tmp_path / "plain") == artifact_hashes(tmp_path / "slow")


def test_threads_are_as_many_as_memory_has_room_for(tmp_path, monkeypatch, capsys):
    shards, sae = make_shards(tmp_path / "shards", make_acts(40)), make_sae(tmp_path / "sae.pt")
    args = [
        "extract",
        "--shards",
        str(shards),
        "--sae",
        str(sae),
        "--batch-tokens",
        "1",
        "--self-check",
        "off",
        "--no-progress",
    ]
    asked = defaultdict(int)
    estimated = estimate.estimate

    def note(*args):
        need = estimated(*args)
        asked[need.n_threads] = need.host_total
        return need

    monkeypatch.setattr(estimate, "estimate", note)
    monkeypatch.setattr(job, "batch_threads", lambda device: 30)
    monkeypatch.setattr(estimate, "available_memory", lambda: 0)
    with pytest.raises(SystemExit, match=r"^1$"):
        main([*args, "--out", str(tmp_path / "refused")])
    err = capsys.readouterr().err
    assert "of host memory" in err
    assert "30 threads" not in err
    assert sorted(asked) == list(range(1, 31))
    assert [asked[n] for n in range(1, 31)] == sorted(asked.values())
    assert asked[30] - asked[10] > 20 * Shards.open(shards).content_bytes, "each thread holds an image"
    monkeypatch.setattr(estimate, "available_memory", lambda: asked[11] - 1)
    main([*args, "--out", str(tmp_path / "run")])
    assert "warning: 10 of 30 threads encode" in capsys.readouterr().err
    assert threads_of(tmp_path / "run") == 10
    monkeypatch.setattr(estimate, "available_memory", lambda: asked[30])
    main([*args, "--out", str(tmp_path / "all")])
    assert "warning" not in capsys.readouterr().err
    assert artifact_hashes(tmp_path / "run") == artifact_hashes(tmp_path / "all")


def test_nobody_waits_for_what_nobody_wants(monkeypatch):
    """An encoder that is left amid a batch does not finish it."""
    n_seen, take = 0, Sieve.take

    def count(*args):
        nonlocal n_seen
        n_seen += 1
        time.sleep(0.05)
        return take(*args)

    monkeypatch.setattr(Sieve, "take", count)
    monkeypatch.setattr(pieces, "BLOCK_FEATURES", 16)
    random = torch.Generator().manual_seed(0)
    w_ds = torch.randn(8, 16 * 500, generator=random)
    sae = Sae(
        w_enc_ds=w_ds, b_enc_s=torch.zeros(8000), w_dec_sd=w_ds.T, b_dec_d=torch.zeros(8), activation=Threshold(0.0),
        pre_bias=False, source="",
    )  # fmt: skip
    with Encoder(sae, CPU, "fp32", 2) as encoder:
        codes = encoder.submit_batch(torch.randn(10, 8, generator=random), img_i=0, n_patches=5)
        wait_for(lambda: n_seen)
    assert n_seen < 500
    with pytest.raises(CancelledError):
        codes[0].result()
