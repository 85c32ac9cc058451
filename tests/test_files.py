import csv
import errno
import os

import numpy as np
import pytest
import torch
from torch import nn

from simclr import Config
from support import checkpoints, files

# writing without losing what was there


def write_checkpoint(path):
    model = nn.Linear(50, 50)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpoints.save(path, 3, model, optimizer, [{"epoch": 3}], Config())


WRITERS = {
    "checkpoint": write_checkpoint,
    "json": lambda path: files.write_json(path, {"key": "x" * 10_000}),
    "csv": lambda path: files.write_csv(path, [{"epoch": i} for i in range(5000)]),
    "arrays": lambda path: files.write_arrays(path, a=np.random.default_rng(0).random(5000)),
    "encoder": lambda path: checkpoints.save_weights(path, nn.Linear(50, 50), {}),
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@pytest.fixture
def previous(tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"the previous one")
    return path


def check_untouched(path):
    assert path.read_bytes() == b"the previous one"
    assert list(path.parent.iterdir()) == [path]


@every_writer
def test_writers_replace_the_file_and_leave_nothing_else(previous, write):
    write(previous)
    assert len(previous.read_bytes()) > 5000
    assert list(previous.parent.iterdir()) == [previous]


@every_writer
def test_content_is_on_the_disk_before_the_name_is(previous, monkeypatch, write):
    synced, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(file):
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    def checked_replace(source, target):
        assert os.stat(source).st_ino in synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", checked_replace)
    write(previous)
    assert os.stat(previous).st_ino in synced


@every_writer
def test_full_disk_keeps_the_previous_file(previous, user_error, small_disk, write):
    with small_disk(4000), user_error(previous):
        write(previous)
    check_untouched(previous)


@every_writer
def test_failed_rename_keeps_the_previous_file(previous, monkeypatch, user_error, write):
    def replace(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)
    with user_error(previous, "Permission denied"):
        write(previous)
    check_untouched(previous)


@every_writer
def test_place_that_cannot_be_written_is_named(previous, tmp_path, user_error, write):
    for path in (previous / "below", tmp_path / "missing" / "file"):
        with user_error(path):
            write(path)
    check_untouched(previous)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_what_stops_a_write_leaves_the_previous_file(previous, raised):
    def write():
        with files.atomic_file(previous) as temporary:
            temporary.write_bytes(b"half")
            raise raised

    with pytest.raises(raised):
        write()
    check_untouched(previous)


# reading what was written


def test_csv_has_the_columns_of_all_rows_and_exact_numbers(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": 1e-300, "knn": 0.1 + 0.2}]
    files.write_csv(path, rows[:1])
    files.write_csv(path, rows)
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["epoch", "loss", "knn"]
    assert [int(row["epoch"]) for row in table] == [1, 2]
    assert [float(row["loss"]) for row in table] == [1 / 3, 1e-300]
    assert [row["knn"] for row in table] == ["", repr(0.1 + 0.2)]


def test_a_table_is_read_back_by_the_types_of_its_columns(tmp_path):
    path = tmp_path / "scores.csv"
    assert files.read_csv(path, {"labels": int}) == []
    rows = [{"labels": 10, "method": 'a "b", c', "accuracy": 1 / 3, "other": 1}]
    files.write_csv(path, rows)
    columns = {"labels": int, "method": str, "accuracy": files.finite}
    assert files.read_csv(path, columns) == [{k: rows[0][k] for k in columns}]


NO_TABLES = {
    "not a number": b"labels,accuracy\n1,nan\n",
    "infinite": b"labels,accuracy\n1,inf\n",
    "a fraction for a whole number": b"labels,accuracy\n1.5,0.5\n",
    "a column less": b"labels\n1\n",
    "a value less": b"labels,accuracy\n1\n",
    "empty values": b"labels,accuracy\n,\n",
    "an open quote": b'labels,accuracy\n1,"0.5\n',
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("content", NO_TABLES.values(), ids=NO_TABLES)
def test_a_table_that_is_none_is_refused(tmp_path, user_error, content):
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    columns = {"labels": int, "accuracy": files.finite}
    with user_error(path, "damaged"):
        files.read_csv(path, columns)


NO_OBJECTS = {
    "empty": b"",
    "a list": b"[1]",
    "a number": b"3",
    "half": b'{"a": 1',
    "no text": b"\xff\xfe",
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_json_that_is_no_object_is_refused(tmp_path, user_error, content):
    path = tmp_path / "values.json"
    path.write_bytes(content)
    with user_error(path, "damaged"):
        files.read_json(path)


def test_a_folder_or_nothing_in_place_of_a_file_is_named(tmp_path, user_error):
    for path in (tmp_path, tmp_path / "missing.json"):
        with user_error(path):
            files.read_json(path)
    with user_error(tmp_path):
        files.read_csv(tmp_path, {"a": int})


def test_arrays_come_back_and_code_does_not_run(tmp_path, user_error):
    path = tmp_path / "arrays.npz"
    arrays = {"numbers": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "é", "\udce9"])}
    files.write_arrays(path, **arrays)
    found = files.read_arrays(path)
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    np.savez(path, numbers=np.array([{}], object))  # which is pickled
    with user_error(path, "damaged"):
        files.read_arrays(path)


def test_damaged_arrays_are_refused(tmp_path, user_error):
    path = tmp_path / "arrays.npz"
    files.write_arrays(path, numbers=np.random.default_rng(0).random(100))
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for content in (b"", b"text", good[:middle], flipped):
        path.write_bytes(content)
        with user_error(path, "damaged"):
            files.read_arrays(path)


def test_table_with_given_columns_takes_rows_one_by_one(tmp_path):
    rows = ({"name": name} for name in ("a", "ä", "caf\udce9"))
    files.write_csv(tmp_path / "a.csv", rows, ("name", "more"))
    assert (tmp_path / "a.csv").read_text("utf-8").split() == [
        "name,more",
        "a,",
        "ä,",
        r"caf\udce9,",
    ]
    files.write_csv(tmp_path / "a.csv", [], ("name", "more"))
    assert (tmp_path / "a.csv").read_text().split() == ["name,more"]
