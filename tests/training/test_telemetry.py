from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dico_ray.storage import Storage
from dico_ray.training.telemetry import EVALUATED, METRICS, MetricsLog, read_evaluated, read_metrics


def write(storage: Storage, start: int, steps: range, loss: float = 1.0) -> None:
    log = MetricsLog(storage, start)
    for step in steps:
        log.log({"step": step, "loss": loss / step, "lr": 1e-4})
    log.close()


def steps_of(storage: Storage) -> list[int]:
    return [metrics["step"] for metrics in read_metrics(storage)]


def test_every_log_is_a_line_at_once(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    log = MetricsLog(storage, 0)
    assert (tmp_path / METRICS).read_text() == ""
    for step in (10, 20):
        log.log({"step": step, "loss": 1 / 3, "lr": 1e-4})
        lines = (tmp_path / METRICS).read_text().splitlines()
        assert len(lines) == step // 10
        assert json.loads(lines[-1]) == {"step": step, "loss": 1 / 3, "lr": 1e-4}
    log.close()
    assert read_metrics(storage) == [{"step": s, "loss": 1 / 3, "lr": 1e-4} for s in (10, 20)]


def test_a_run_that_has_not_logged(tmp_path: Path) -> None:
    assert read_metrics(Storage(str(tmp_path))) == []
    assert read_metrics(Storage(str(tmp_path / "absent"))) == []


def test_resuming_drops_what_lies_beyond(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write(storage, 0, range(1, 9))
    write(storage, 5, range(6, 8), loss=100.0)
    assert steps_of(storage) == [1, 2, 3, 4, 5, 6, 7]
    assert [m["loss"] > 10 for m in read_metrics(storage)] == [False] * 5 + [True] * 2
    write(storage, 0, range(1, 3))
    assert steps_of(storage) == [1, 2]  # from the start: all anew


def test_a_line_cut_short_is_left_out_and_does_not_stick(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write(storage, 0, range(1, 4))
    whole = (tmp_path / METRICS).read_bytes()
    for cut in (2, 3, 10):  # the line's end and more
        (tmp_path / METRICS).write_bytes(whole[:-cut])
        assert steps_of(storage) == [1, 2]
    write(storage, 3, range(4, 6))
    assert steps_of(storage) == [1, 2, 4, 5]
    assert all(json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines())


def test_a_last_line_without_its_end_counts(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write(storage, 0, range(1, 4))
    (tmp_path / METRICS).write_bytes((tmp_path / METRICS).read_bytes()[:-1])
    write(storage, 3, range(4, 5))
    assert steps_of(storage) == [1, 2, 3, 4]


def check_tensorboard(folder: Path) -> None:
    files = list((folder / "tensorboard").iterdir())
    assert files
    assert all(file.name.startswith("events.out.tfevents") for file in files)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["loss", "lr"]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 8.0), (2, 4.0), (3, pytest.approx(8 / 3))]


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    write(Storage(str(tmp_path)), 0, range(1, 4), loss=8.0)
    check_tensorboard(tmp_path)


def test_tensorboard_too_drops_what_lies_beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    write(Storage(str(tmp_path)), 0, range(1, 9), loss=99.0)
    later = time.time() + 5
    monkeypatch.setattr(time, "time", lambda: later)  # event files are ordered by the second in their names
    write(Storage(str(tmp_path)), 0, range(1, 4), loss=8.0)
    check_tensorboard(tmp_path)


def test_a_file_url_is_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(Storage(f"file://{tmp_path}/run"), 0, range(1, 4), loss=8.0)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    check_tensorboard(tmp_path / "run")


def test_an_object_store_holds_both_too(tmp_path: Path) -> None:
    storage = Storage("memory://test-telemetry/run")
    try:
        write(storage, 0, range(1, 9))
        write(storage, 2, range(3, 5))
        assert steps_of(storage) == [1, 2, 3, 4]
        boards = [name for name in storage.names() if name.startswith("tensorboard/events.out.tfevents")]
        assert len(boards) == 2
        storage.remove("tensorboard")
        write(storage, 0, range(1, 4), loss=8.0)
        for name in storage.names():
            Storage(str(tmp_path)).write(name, storage.read(name))
        check_tensorboard(tmp_path)
    finally:
        Storage("memory://test-telemetry").remove("run")


def test_evaluations_have_lines_of_their_own_and_survive_a_resume(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    log = MetricsLog(storage, 0)
    one, two, three = ({"step": step, "loss": 1.0} for step in (1, 2, 3))
    first, second, third = ({"step": step, "fid": 10.0 - step, EVALUATED: 100} for step in (1, 2, 3))
    for metrics in (one, two, first, three, third, second):
        log.log(metrics)
    log.close()
    assert steps_of(storage) == [1, 2, 3]
    assert [(m["step"], m["fid"]) for m in read_evaluated(storage)] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("fid")] == [(1, 9.0), (3, 7.0), (2, 8.0)]
    assert [e.step for e in board.Scalars("loss")] == [1, 2, 3]
    write(storage, 2, range(3, 5))
    assert steps_of(storage) == [1, 2, 3, 4]
    assert [m["step"] for m in read_evaluated(storage)] == [1, 2]  # the third step's weights are trained anew


def test_a_line_that_a_full_disk_cut_is_written_again(tmp_path: Path) -> None:
    log = MetricsLog(Storage(str(tmp_path)), 0)
    log.log({"step": 1, "loss": 1.0})
    file = tmp_path / "metrics.jsonl"
    file.rename(tmp_path / "before")
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        log.log({"step": 2, "loss": 0.5})
    log.log({"step": 3, "loss": 0.25})  # there is room again: the file is made anew
    log.close()
    assert not file.is_symlink()
    assert [m["step"] for m in read_metrics(Storage(str(tmp_path)))] == [1, 2, 3]
