"""The reader delivers every batch, in order and unharmed while it is held, from small shards and big ones."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from saev_dist.data import reader
from saev_dist.data.reader import Reader, buffer_examples, most_buffers
from saev_dist.data.shards import Shards, ShardWriter
from saev_dist.errors import DataError
from saev_dist.plan import Plan

N_IMGS, N_PATCHES, D_MODEL = 61, 3, 4


def write(dpath: Path, examples_per_shard: int) -> Shards:
    acts_eltd = np.arange(N_IMGS * N_PATCHES * D_MODEL, dtype=np.float32).reshape(N_IMGS, 1, N_PATCHES, D_MODEL)
    with ShardWriter(
        dpath, family="t", ckpt="t", layers=[0], content_tokens_per_example=N_PATCHES, d_model=D_MODEL, cls_token=False,
        max_tokens_per_shard=examples_per_shard * N_PATCHES,
    ) as writer:  # fmt: skip
        writer.write(acts_eltd)
    return Shards.open(dpath)


@pytest.mark.parametrize("examples_per_shard", [1, 3, 20])
@pytest.mark.parametrize("bad", [(), (0, 1, 2), tuple(range(12)), (2,)])
@pytest.mark.parametrize(("batch", "n_parts"), [(1, 1), (2, 1), (2, 3), (7, 1), (7, 3), (10, 4), (100, 5)])
def test_batches_come_in_order_and_stay_while_held(tmp_path, monkeypatch, examples_per_shard, bad, batch, n_parts):
    monkeypatch.setattr(reader, "MIN_PART_BYTES", 1)
    shards = write(tmp_path, examples_per_shard)
    bad = [shard_i for shard_i in bad if shard_i < len(shards.names)]
    for shard_i in bad:
        fpath = tmp_path / shards.names[shard_i]
        if shard_i % 2:
            os.truncate(fpath, fpath.stat().st_size // 2)
        else:
            fpath.unlink()
    plan = Plan(shards.examples, batch)
    todo = ((0, 2), (3, len(plan)))
    wanted = [plan[index] for first, stop in todo for index in range(first, stop)]
    # Of a shard that is too short, what comes before its end is good.
    good = [
        batch.index for batch in wanted
        if batch.shard_i not in bad
        or (batch.shard_i % 2 and batch.example_i + batch.n_examples <= shards.examples[batch.shard_i] // 2)
    ]  # fmt: skip
    hold, seen = 2, []
    stream = Reader(shards, plan, todo, depth=3, hold=hold, n_parts=n_parts, skip_bad=True)
    for batch, acts_bd in stream:
        seen.append((batch, acts_bd))
        for earlier, held_bd in seen[-1 - hold :]:
            first = earlier.img_i * N_PATCHES * D_MODEL
            assert torch.equal(held_bd.flatten(), torch.arange(first, first + held_bd.numel(), dtype=torch.float32))
            assert len(held_bd) == earlier.n_examples * N_PATCHES
    assert [batch.index for batch, _ in seen] == good
    assert sorted(stream.left_out) == [batch.index for batch in wanted if batch.index not in good]
    assert stream.n_left_out == sum(batch.n_examples for batch in wanted if batch.index not in good)
    assert stream.n_bytes == sum(batch.n_examples for batch, _ in seen) * shards.content_bytes
    buffers = {acts_bd.untyped_storage().data_ptr(): acts_bd.untyped_storage().nbytes() for _, acts_bd in seen}
    room = buffer_examples(plan) * shards.content_bytes
    assert set(buffers.values()) <= {room}
    if not bad:
        assert len(buffers) <= most_buffers(plan, 3, hold), "the memory that is stated"


def test_all_before_a_bad_shard_is_delivered_then_the_error(tmp_path):
    shards = write(tmp_path, 1)
    (tmp_path / shards.names[5]).unlink()
    stream = iter(Reader(shards, Plan(shards.examples, 1), ((0, N_IMGS),), depth=2))
    assert [next(stream)[0].index for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=shards.names[5]):
        next(stream)


def test_small_shards_are_read_into_one_buffer(tmp_path):
    """One handing over, and not one a shard: `tests.bench.read` has what it saves."""
    shards = write(tmp_path, 1)
    stream = Reader(shards, Plan(shards.examples, 20), ((0, N_IMGS),), depth=1)
    places = [(acts_bd.untyped_storage().data_ptr(), acts_bd.storage_offset()) for _, acts_bd in stream]
    assert len({buffer for buffer, _ in places}) <= most_buffers(stream.plan, 1, 1) < N_IMGS / 10
    assert [at for _, at in places] == [index % 20 * N_PATCHES * D_MODEL for index in range(N_IMGS)]


def test_it_says_whether_the_next_batch_is_there(tmp_path, monkeypatch):
    go_on, read_batch = threading.Event(), reader.read_batch

    def read(shards, batch, buffer, *, patient):
        if batch.img_i == 1:
            go_on.wait(30)
        read_batch(shards, batch, buffer, patient=patient)

    monkeypatch.setattr(reader, "read_batch", read)
    shards = write(tmp_path, 20)
    source = Reader(shards, Plan(shards.examples, 1), ((0, 3),), depth=1)
    stream = iter(source)
    next(stream)
    assert not source.is_ready
    go_on.set()
    next(stream)
    next(stream)
    assert source.is_ready, "there is none left to wait for"


def test_stopping_early_leaves_no_thread(tmp_path):
    shards = write(tmp_path, 3)
    source = Reader(shards, Plan(shards.examples, 2), ((0, 10),), depth=3)
    stream = iter(source)
    next(stream)
    assert any(thread.name.startswith("reader") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())
    assert len(list(source)) == 10, "it can begin anew"


def test_of_several_layers_only_the_wanted_one_is_read(tmp_path):
    """Gaps beyond `MAX_GAP_BYTES` are passed over: counted by the kernel."""
    n_imgs, n_layers, d_model = 8, 5, 8_192
    acts_eltd = np.random.default_rng(0).standard_normal((n_imgs, n_layers, N_PATCHES, d_model), np.float32)
    with ShardWriter(
        tmp_path, family="t", ckpt="t", layers=range(n_layers), content_tokens_per_example=N_PATCHES, d_model=d_model,
        cls_token=False, max_tokens_per_shard=4 * n_layers * N_PATCHES,
    ) as writer:  # fmt: skip
        writer.write(acts_eltd)
    shards = Shards.open(tmp_path, 3)
    before = asked_bytes()
    acts_btd = [acts_bd.clone() for _, acts_bd in Reader(shards, Plan(shards.examples, 2), ((0, 4),), depth=2)]
    asked = asked_bytes() - before
    assert np.array_equal(torch.cat(acts_btd).numpy().reshape(n_imgs, N_PATCHES, d_model), acts_eltd[:, 3])
    wanted = n_imgs * shards.content_bytes
    assert wanted <= asked < 1.1 * wanted


def asked_bytes() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("how", [np.asfortranarray, lambda a: a.astype(">f4"), lambda a: np.repeat(a, 2, axis=3)[..., ::2]])
def test_arrays_of_any_layout_are_written_as_the_format_has_them(tmp_path, how):
    acts_eltd = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)
    with ShardWriter(
        tmp_path / "s", family="test", ckpt="noise", layers=[0, 1], content_tokens_per_example=3, d_model=4, cls_token=False,
        max_tokens_per_shard=2 * 2 * 3,
    ) as writer:  # fmt: skip
        writer.write(how(acts_eltd))
    written = b"".join(fpath.read_bytes() for fpath in sorted((tmp_path / "s").glob("*.bin")))
    assert written == acts_eltd.astype("<f4").tobytes()


def test_a_buffer_is_used_again_only_when_no_part_is_read_into_it_any_more(tmp_path, monkeypatch):
    """The first part of a batch fails at once, the other one is slow."""
    shards = write(tmp_path, 20)
    read_batch = reader.read_batch

    def read(shards, batch, buffer, *, patient):
        if batch.img_i == 0:
            raise DataError("bad")
        if batch.img_i == 2:
            time.sleep(0.2)
        read_batch(shards, batch, buffer, patient=patient)

    monkeypatch.setattr(reader, "MIN_PART_BYTES", 1)
    monkeypatch.setattr(reader, "read_batch", read)
    stream = Reader(shards, Plan(shards.examples, 4), ((0, 4),), depth=1, hold=0, n_parts=2, skip_bad=True)
    for batch, acts_bd in stream:
        time.sleep(0.3)
        first = batch.img_i * N_PATCHES * D_MODEL
        assert torch.equal(acts_bd.flatten(), torch.arange(first, first + acts_bd.numel(), dtype=torch.float32))
    assert list(stream.left_out) == [0]
