"""History: one row an epoch, in a CSV and in TensorBoard's events; sums that survive a stop."""

from __future__ import annotations

import csv

import torch
from engine.training import loaders, trainer

from ffengine.engine.context import BatchReport
from ffengine.engine.run.history import EpochSums, History, Row, read_rows


def row(epoch, valid=0.5):
    return Row(epoch, 0.1, 1.5, [1.0, 2.0], 0.25, valid, 1.0, 10.0, 100, 1, 3)


def test_csv_has_a_row_an_epoch_and_reads_back(tmp_path):
    train, valid, _ = loaders()
    t = trainer(epochs=2, out=tmp_path)
    t.fit(train, valid)
    with (tmp_path / "history.csv").open() as file:
        records = list(csv.DictReader(file))
    assert [r["epoch"] for r in records] == ["0", "1"]
    assert {"lr", "loss", "loss_0", "loss_3", "train_accuracy", "valid_accuracy", "seconds",
            "images_per_second", "peak_bytes", "sip_start", "sip_end"} <= records[0].keys()
    assert read_rows(tmp_path / "history.csv") == t.history.rows


def test_resumed_history_drops_rows_of_epochs_to_come(tmp_path):
    history = History(tmp_path)
    for e in range(3):
        history.add(row(e, None if e == 0 else 0.5))
    history.close()
    again = History(tmp_path, before=2)
    assert again.rows == [row(0, None), row(1)]
    again.add(row(2))
    again.close()
    assert [r.epoch for r in read_rows(tmp_path / "history.csv")] == [0, 1, 2]


def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = History(tmp_path)
    history.add(row(0))
    history.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"epoch/loss", "epoch/valid_accuracy", "layers/loss_1"} <= set(events.Tags()["scalars"])


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = History()
    history.add(row(0))
    history.close()
    assert history.rows == [row(0)] and not list(tmp_path.iterdir())


def test_sums_are_sample_means_and_survive_export():
    y = torch.tensor([0, 1, 1])
    goodness = torch.eye(2)[torch.tensor([0, 1, 0])]
    report = BatchReport([torch.tensor(1.0), None], [goodness, None])
    sums = EpochSums()
    sums.add(report, y, torch.tensor(2))
    again = EpochSums(sums.export())
    again.add(BatchReport([torch.tensor(3.0), None], [goodness[:1], None]), y[:1], torch.tensor(1))
    assert again.losses() == [1.5, 0.0] and again.accuracy() == 0.75
    assert EpochSums().export() == {} and EpochSums({}).losses() == []
