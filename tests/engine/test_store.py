"""The feature store: the same rows from RAM and from disk, and only RAM is counted as RAM."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import weakref

import pytest
import torch

from ffengine.engine.memory import store as stores
from ffengine.engine.memory.meter import MemoryMeter
from ffengine.engine.memory.store import FeatureStore, choose_store

KINDS = ["ram", "disk"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def features(rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
             ) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, *shape, generator=generator).to(dtype)


def filled(kind: str, x: torch.Tensor, folder, batch: int = 7, **options) -> FeatureStore:
    store = FeatureStore.create(kind, len(x), tuple(x.shape[1:]), x.dtype, folder, **options)
    for start in range(0, len(x), batch):
        store.write(start, x[start : start + batch])
    return store


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2), (), (1, 1, 1), (0,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_bit_for_bit(kind, shape, dtype, tmp_path):
    x = features(23, shape, dtype)
    with filled(kind, x, tmp_path) as store:
        assert len(store) == 23 and store.nbytes == x.numel() * x.element_size()
        assert torch.equal(store.read(slice(None)), x)
        assert torch.equal(store.read(slice(20, 99)), x[20:])
        assert store.read(slice(5, 2)).shape == (0, *shape)
        for index in (torch.randperm(23), torch.tensor([4, 5, 6, 2, 2, 3, 0]),
                      torch.tensor([], dtype=torch.int64), torch.tensor([22])):
            got = store.read(index)
            assert got.dtype is dtype and torch.equal(got, x[index])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_a_copy(kind, tmp_path):
    x = features(6, (3,))
    store = filled(kind, x, tmp_path)
    store.read(slice(0, 3)).zero_()
    store.read(torch.arange(6)).zero_()
    assert torch.equal(store.read(slice(None)), x)
    source = x.clone()
    store.write(0, source)
    source.zero_()
    assert torch.equal(store.read(slice(None)), x)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_written_again_in_any_order_and_layout(kind, tmp_path):
    x = features(8, (4, 3, 5))
    with FeatureStore.create(kind, 8, (4, 3, 5), x.dtype, tmp_path) as store:
        store.write(4, x[4:].to(memory_format=torch.channels_last))
        store.write(0, torch.cat([x, x])[::2][:4].requires_grad_())
        store.write(0, x[:4].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1))
        store.write(3, x[:0])
        got = store.read(torch.arange(8))
        assert torch.equal(got, x) and not got.requires_grad and got.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_is_kept(kind, tmp_path):
    x = features(9, (4, 3, 5), torch.bfloat16)
    with filled(kind, x.to(memory_format=torch.channels_last), tmp_path,
                channels_last=True) as store:
        for got, expected in ((store.read(slice(2, 6)), x[2:6]),
                              (store.read(torch.tensor([8, 1])), x[[8, 1]])):
            assert torch.equal(got, expected)
            assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_one_line(kind, tmp_path):
    x = features(5, (3,))
    store = FeatureStore.create(kind, 5, (3,), x.dtype, tmp_path)
    store.write(0, x[:4])
    wrong = [
        (ValueError, r"expected rows \(n, 3\), got \(2, 4\)",
         lambda: store.write(0, x.new_ones(2, 4))),
        (ValueError, r"expected rows \(n, 3\), got \(3,\)", lambda: store.write(0, x[0])),
        (TypeError, "rows of torch.float32, got torch.float64", lambda: store.write(0, x.double())),
        (IndexError, r"within 0\.\.4, got 3\.\.7", lambda: store.write(3, x)),
        (IndexError, r"got -1\.\.0", lambda: store.write(-1, x[:2])),
        (IndexError, r"within 0\.\.4, got 5", lambda: store.read(torch.tensor([1, 5]))),
        (IndexError, r"got -2", lambda: store.read(torch.tensor([-2]))),
        (TypeError, r"index \(n,\), got torch.int32", lambda: store.read(torch.ones(2).int())),
        (TypeError, "got list", lambda: store.read([1, 2])),
        (ValueError, "step 1, got 2", lambda: store.read(slice(0, 4, 2))),
        (ValueError, "row 4 was read before it was written", lambda: store.read(slice(None))),
    ]
    for error, text, call in wrong:
        with pytest.raises(error, match=text) as caught:
            call()
        assert str(caught.value).startswith("[store] ") and "\n" not in str(caught.value)
    assert torch.equal(store.read(slice(0, 4)), x[:4])
    store.close()
    store.close()
    for call in (lambda: store.read(slice(0, 1)), lambda: store.write(0, x)):
        with pytest.raises(ValueError, match="expected an open store"):
            call()


def test_kinds_and_shapes():
    for kind in ("recompute", "tape"):
        with pytest.raises(ValueError, match=rf"kind ram or disk, got '{kind}'"):
            FeatureStore.create(kind, 3, (3,), torch.float32)
    with pytest.raises(ValueError, match="rows and a shape >= 0"):
        FeatureStore.create("ram", -1, (3,), torch.float32)
    with pytest.raises(ValueError, match=r"channels_last expected a shape \(C, H, W\)"):
        FeatureStore.create("ram", 1, (3,), torch.float32, channels_last=True)


def test_the_meter_counts_ram(tmp_path):
    x = features(10, (1000,))
    with MemoryMeter() as meter:
        store = filled("ram", x, None)
        store.read(torch.tensor([1, 2]))
        store.close()
        after = meter._live["feature"]
    # x, which the meter meets at the first write, and the store
    assert meter.report.peak_bytes >= 2 * 40_000
    assert meter.report.peak_bytes < 2 * 40_000 + 3 * 4000
    assert after <= 40_000 + 100


def test_the_meter_does_not_count_the_disk(tmp_path):
    x = features(500, (1000,), torch.bfloat16)
    store = filled("disk", x, tmp_path)
    index, batch = torch.tensor([3, 400, 1, 2]), x[:4].clone()
    with MemoryMeter() as meter:
        store.write(0, batch)
        got = store.read(index)
        got.sum()
    assert store.nbytes == 10**6 and torch.equal(got, x[index])
    # what is written and what is read, the index, and a sum
    assert 2 * 8000 <= meter.report.peak_bytes <= 2 * 8000 + 200
    assert meter.report.at_peak["feature"] == meter.report.peak_bytes


def test_nothing_is_left_in_the_folder(tmp_path):
    store = filled("disk", features(4, (3,)), tmp_path)
    store.close()
    assert store._file.closed and not list(tmp_path.iterdir())
    store = filled("disk", features(4, (3,)), tmp_path)
    file = weakref.ref(store._file)
    del store
    gc.collect()
    assert file() is None and not list(tmp_path.iterdir())


def test_the_room_is_taken_at_once(tmp_path):
    store = FeatureStore.create("disk", 1000, (1000,), torch.float32, tmp_path)
    seen = os.fstat(store._file.fileno())
    assert seen.st_size == store.nbytes == 4_000_000
    if hasattr(os, "posix_fallocate"):
        assert seen.st_blocks * 512 >= store.nbytes


@pytest.mark.parametrize("number, fine", [(errno.ENOSPC, False), (errno.EOPNOTSUPP, True)])
def test_a_disk_that_promises_nothing(number, fine, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    x = features(5, (3,))
    if fine:
        assert torch.equal(filled("disk", x, tmp_path).read(slice(None)), x)
    else:
        with pytest.raises(OSError, match=r"^\[store\] expected .* of features, got No space left"):
            FeatureStore.create("disk", 5, (3,), torch.float32, tmp_path)


def test_a_disk_that_is_full_or_not_there(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"^\[store\] expected a folder for features, got .*gone$"):
        FeatureStore.create("disk", 1, (1,), torch.float32, tmp_path / "gone")
    rows = shutil.disk_usage(tmp_path).free // 10**9 + 10**4
    with pytest.raises(OSError, match=r"^\[store\] expected \d+\.\d MB free for features in "):
        FeatureStore.create("disk", rows, (10**9,), torch.uint8, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stores.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"^\[store\] expected .* to take 0\.0 kB of features, got P"):
        FeatureStore.create("disk", 1, (1,), torch.float32, tmp_path)


class Halting:
    """A file that takes and gives at most three bytes a call, as a system may."""

    def __init__(self, file) -> None:
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        return self.file.write(data[:3])

    def readinto(self, space):
        return self.file.readinto(space[:3])


def test_short_reads_and_writes_go_on(tmp_path):
    x = features(5, (7,))
    store = FeatureStore.create("disk", 5, (7,), x.dtype, tmp_path)
    store._file = Halting(store._file)
    store.write(0, x)
    assert torch.equal(store.read(torch.tensor([3, 4, 0])), x[[3, 4, 0]])
    store._file.truncate(4)
    with pytest.raises(OSError, match=r"^\[store\] expected features in .*, got the end"):
        store.read(slice(None))


def test_ram_that_cannot_be_had():
    with pytest.raises(MemoryError, match=r"^\[store\] expected \d+\.\d MB of RAM for features"):
        FeatureStore.create("ram", 2**4, (2**40, 2**4), torch.float32)


@pytest.mark.parametrize("room, free, expected", [
    (1000, 0, "ram"), (999, 1000, "disk"), (999, 999, "recompute"), (0, 10**6, "disk"),
    (-5, 0, "recompute"),
])
def test_choice_within_a_budget(room, free, expected):
    assert choose_store(10, 100, room, free) == expected


def test_choice_without_a_budget(monkeypatch):
    monkeypatch.setattr(stores, "free_ram", lambda: 2000)
    assert choose_store(10, 100, None, 0) == "ram"
    assert choose_store(10, 101, None, 2000) == "disk"
    assert choose_store(10, 101, None, 1000) == "recompute"


def test_what_is_free(tmp_path):
    assert 10**6 < stores.free_ram() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert stores.free_disk(tmp_path) > 10**6 and stores.free_disk() > 10**6


@pytest.mark.parametrize("limit, expected", [("9000", 9000 - 5000 + 600), ("max", 20 * 1024),
                                             ("900000", 20 * 1024), ("1000", 0), (None, 20 * 1024)])
def test_a_container_may_have_less_ram(limit, expected, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  40 kB\nMemAvailable:   20 kB\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 600\n")
    if limit:
        (tmp_path / "memory.max").write_text(limit + "\n")
    assert stores.free_ram(tmp_path / "meminfo", tmp_path) == expected
    assert stores.free_ram(tmp_path / "nothing", tmp_path) > 10**6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_rows(kind, tmp_path):
    x = features(6, (4, 3, 5))
    with filled(kind, x.cuda(), tmp_path, channels_last=True) as store:
        assert torch.equal(store.read(torch.tensor([5, 0]).cuda()), x[[5, 0]])
