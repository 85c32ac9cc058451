import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning
import torch
from image_folders import load_folder, make_folder, write_image

import rnn
import rnn_hyperparameter_tune as tune
import simclr
from simclr import Config
from support import devices, files, pretraining, progress, runs, settings
from support.errors import Diverged, UserError
from support.settings import load_config, parse_config

REPOSITORY = Path(runs.__file__).resolve().parents[1]


def make_config(folder, **changes):
    values = {"dataset": "digits", "output_dir": str(folder), "name": "run", "device": "cpu"}
    return Config(**{**values, "precision": "float32", "epochs": 7, "seed": 3, **changes})


# the run folder


@pytest.fixture
def started(tmp_path):
    """The folder of a run with some settings other than the defaults, and its config."""
    config = make_config(tmp_path)
    with runs.open_run(config, "fingerprint") as run:
        return run.folder, config


def resume(folder, *arguments):
    return parse_config(Config, ["--resume", str(folder), *arguments], "")


def test_folder_records_settings_and_circumstances(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--name", "a b", "--epochs", "3"])
    config = make_config(tmp_path / "new" / "er", name="a b")
    with runs.open_run(config, "1a2b") as run:
        assert run.folder == tmp_path / "new" / "er" / "simclr" / "a b"
        record = json.loads((run.folder / "config.json").read_text())
    for name, value in dataclasses.asdict(config).items():
        assert record[name] == (list(value) if isinstance(value, tuple) else value)
    assert (record["script"], record["data"]) == ("simclr", "1a2b")
    assert shlex.split(record["command"])[-5:] == sys.argv
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["hardware"]
    assert record["threads"] == torch.get_num_threads()
    head = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        assert record["commit"].removesuffix("-dirty") == commit.stdout.strip()
    else:
        assert record["commit"] is None


def test_existing_folder_is_refused_and_left_alone(started, user_error):
    folder, config = started
    before = (folder / "config.json").read_bytes()
    with user_error(folder, "--name", "--resume"), runs.open_run(config):
        pass
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("below", ["file", "file/results", "results"])
def test_output_folder_that_cannot_be_written_is_named(tmp_path, user_error, below):
    (tmp_path / "file").write_text("")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "simclr").write_text("")
    with user_error(tmp_path / below), runs.open_run(make_config(tmp_path / below)):
        pass


def test_runs_without_a_name_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20250101-120000")
    folders = []
    for _ in range(3):
        with runs.open_run(make_config(tmp_path, name=None, seed=5)) as run:
            folders.append(run.folder)
    assert len(set(folders)) == 3
    assert all((folder / "config.json").is_file() for folder in folders)
    assert all("seed5" in folder.name for folder in folders)


def test_what_a_killed_process_left_behind_is_in_nobodys_way(tmp_path):
    folder = tmp_path / "simclr" / "run"
    folder.mkdir(parents=True)
    (folder / ".config.json.1-2.tmp").write_text("{")
    with runs.open_run(make_config(tmp_path)) as run:
        (folder / ".checkpoint.pt.1-2.tmp").write_text("half")
    with runs.open_run(resume(run.folder)):
        assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit, UserError])
@pytest.mark.parametrize("name", ["run", "a run"])
@pytest.mark.parametrize("place", ["the repository", "elsewhere"])
def test_error_says_how_to_go_on(tmp_path, monkeypatch, error, name, place):
    """What is copied from `python` to the end of the line works where the user is."""
    if place == "elsewhere":
        monkeypatch.chdir(tmp_path)
    config = make_config("results" if place == "elsewhere" else tmp_path, name=name)
    with pytest.raises(error) as caught, runs.open_run(config):
        raise error
    (note,) = caught.value.__notes__
    python, script, *arguments = shlex.split(note[note.index("python") :])
    assert python == "python"
    assert Path(script).resolve() == REPOSITORY / "simclr.py"
    again = parse_config(Config, arguments, "")
    assert Path(again.resume).resolve() == tmp_path.joinpath(
        *(["results"] if place == "elsewhere" else []), "simclr", name
    )
    assert again == dataclasses.replace(config, resume=again.resume)
    with runs.open_run(again) as reopened:
        assert reopened.folder == Path(again.resume)


# continuing a run


def test_resume_takes_the_saved_settings(started):
    folder, config = started
    assert load_config(Config, folder) == config
    again = resume(folder)
    assert again == dataclasses.replace(config, resume=str(folder))
    before = json.loads((folder / "config.json").read_text())
    with runs.open_run(again) as reopened:
        assert reopened.folder == folder
    after = json.loads((folder / "config.json").read_text())
    assert len(after.pop("resumed")) == 1 + len(before.pop("resumed"))
    assert after == before


CHANGED = {
    "epochs": 8,
    "seed": 4,
    "temperature": 0.1,
    "jitter": (0.2, 0.2, 0.2, 0.1),
    "encoder": "small",
    "precision": "bfloat16",
}


@pytest.mark.parametrize(("name", "value"), CHANGED.items())
def test_resume_refuses_a_contradiction_and_names_both_values(started, user_error, name, value):
    folder, config = started
    again = dataclasses.replace(resume(folder), **{name: value})
    with (
        user_error(folder, settings.flag(name), getattr(config, name), value),
        runs.open_run(again),
    ):
        pass


def test_resume_allows_a_flag_that_repeats_the_saved_value(started):
    folder, _ = started
    with runs.open_run(resume(folder, "--epochs", "7", "--dataset", "digits")):
        pass


ELSEWHERE = {
    "data_dir": "elsewhere",
    "download_url": "http://127.0.0.1/",
    "output_dir": "elsewhere",
    "name": "another one",
    "device": "auto",
    "logger": "tensorboard",
    "devices": 2,
}


@pytest.mark.parametrize(("name", "value"), ELSEWHERE.items())
def test_resume_allows_other_places(started, name, value):
    folder, config = started
    assert value != getattr(config, name)
    with runs.open_run(dataclasses.replace(resume(folder), **{name: value})) as reopened:
        assert reopened.folder == folder


@pytest.mark.parametrize("name", sorted(pretraining.EVALUATION))
def test_resume_allows_another_evaluation_where_that_is_free(started, user_error, name):
    folder, config = started
    values = {"stages": "probe", "labels": "7,all", "pixel_baseline": True, "embedding": "umap"}
    value = values.get(name) or getattr(config, name) + 1
    again = dataclasses.replace(resume(folder), **{name: value})
    with runs.open_run(again, free=pretraining.EVALUATION) as reopened:
        assert reopened.folder == folder
    # What the numbers come from now; the stages are those of the whole run.
    saved = resume(folder)
    assert getattr(saved, name) == (getattr(config, name) if name == "stages" else value)
    # A stage that does not run leaves the record of what it was run with.
    first = dataclasses.replace(saved, **{name: getattr(config, name)})
    with runs.open_run(first, free=pretraining.EVALUATION, unread=frozenset({name})):
        pass
    assert getattr(resume(folder), name) == getattr(saved, name)
    other = first if name != "stages" else again
    with user_error(settings.flag(name)), runs.open_run(other):
        pass


def test_moved_run_is_resumed_where_it_is_now(started, tmp_path):
    folder, _ = started
    moved = folder.rename(tmp_path / "elsewhere")
    with runs.open_run(resume(moved)) as reopened:
        assert reopened.folder == moved
    assert not folder.exists()


def test_other_hardware_is_said_and_the_precision_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "old"}, raising=False)
    with runs.open_run(make_config(tmp_path, precision="auto")) as run:
        pass
    new = {"cpu_name": "new", "amx_bf16": True, "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: new, raising=False)
    assert devices.pick_precision("cpu", "auto") == "bf16-mixed"
    assert "old" not in capsys.readouterr().out
    with runs.open_run(resume(run.folder)):
        assert json.loads((run.folder / "config.json").read_text())["precision"] == "float32"
    (line,) = capsys.readouterr().out.splitlines()
    assert "old CPU" in line
    assert "new CPU" in line


# A run is tied to its images, not to the spelling of their place.


@pytest.fixture
def trained_on_images(tmp_path, monkeypatch):
    """A run on a folder of images that is called `images` where the user is."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", *(f"{kind}/{i}.png" for kind in "ab" for i in range(5)))
    config = make_config(tmp_path, dataset="images", image_size=8)
    with open_with_data(config) as run:
        return run.folder


def open_with_data(config):
    data = load_folder(config.dataset, config.data_dir, config.image_size)
    return runs.open_run(config, data.fingerprint())


def test_the_same_images_under_another_name_are_taken(trained_on_images, tmp_path, monkeypatch):
    for name in ("images", "./images/", str(tmp_path / "images"), "x/../images"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with open_with_data(resume(trained_on_images, "--dataset", name)) as run:
            assert run.folder == trained_on_images
    (tmp_path / "images").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "x")
    with open_with_data(resume(trained_on_images, "--dataset", "../moved")) as run:
        assert run.folder == trained_on_images


def test_other_images_under_the_same_name_are_refused(trained_on_images, tmp_path, user_error):
    write_image(tmp_path / "images" / "a" / "3.png", (1, 2, 3))
    with user_error(trained_on_images, "other images"):
        open_with_data(resume(trained_on_images)).__enter__()


# The lock: one process at a time, and none after an error.


def test_a_run_in_use_is_refused(started, user_error):
    folder, _ = started
    with runs.open_run(resume(folder)):
        opened = runs.open_run(resume(folder))
        with user_error(folder, "in use by another process"):
            opened.__enter__()


def test_the_lock_is_free_again_after_settings_are_refused(started, user_error):
    folder, _ = started
    refused = []  # keeps the tracebacks, as a notebook does
    for config, data in (
        (resume(folder, "--epochs", "9"), "fingerprint"),
        (resume(folder), "another"),
        (dataclasses.replace(resume(folder), logger="wandb"), "fingerprint"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            with pytest.raises(UserError) as caught, runs.open_run(config, data):
                pass
        refused.append(caught)
        with runs.open_run(resume(folder), "fingerprint"):
            pass
    with pytest.raises(ZeroDivisionError) as caught, runs.open_run(resume(folder)):
        raise ZeroDivisionError
    with runs.open_run(resume(folder)):
        pass


# summary.json


def test_summary_keeps_the_other_stages_and_adds_up_their_seconds(tmp_path):
    run = runs.Run(tmp_path)
    run.summarize({"final_loss": 1.0, "pretrain_seconds": 10.0})
    run.summarize({"accuracy": 0.5, "probe_seconds": 4.0})
    returned = run.summarize({"accuracy": 0.6, "probe_seconds": 3.0, "embed_seconds": 1})
    assert returned == json.loads((tmp_path / "summary.json").read_text())
    assert returned == {
        "final_loss": 1.0,
        "accuracy": 0.6,
        "pretrain_seconds": 10.0,
        "probe_seconds": 3.0,
        "embed_seconds": 1,
        "seconds": 14.0,
    }


def test_a_stage_may_return_what_json_can_hold(tmp_path):
    values = {"method": "good", "parts": {"a": 0.5, "b": [1, 2]}, "nothing": None}
    values |= {"cell_seconds": "many"}  # is no time
    run = runs.Run(tmp_path)
    run.summarize(values | {"accuracy": 0.5})
    del values["nothing"]
    # A later evaluation without a score takes it away.
    assert run.summarize({"x_seconds": 2.0, "accuracy": None}) == {
        **values, "x_seconds": 2.0, "seconds": 2.0
    }  # fmt: skip


def test_a_place_that_may_not_be_used_is_one_line(capsys):
    def closed():
        raise PermissionError(13, "Permission denied", "/there/config.json")

    with pytest.raises(SystemExit) as caught:
        runs.exit_cleanly(closed)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: cannot use /there/config.json: Permission denied\n"


def test_damaged_summary_is_named(tmp_path, user_error):
    (tmp_path / "summary.json").write_text('{"final_loss": 1')
    with user_error(tmp_path / "summary.json"):
        runs.Run(tmp_path).summarize({})


# exit codes


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(5)


def send_to_destructors(number):
    """Let the signal come in a destructor, and again in another one when it is repeated."""

    class First:
        def __del__(self):
            os.kill(os.getpid(), number)

    class Second:
        def __del__(self):
            time.sleep(0.5)

    first, second = First(), Second()
    del first
    del second
    time.sleep(5)


def throw(error):
    raise error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate", True),
        ("MPS backend out of memory (MPS allocated: 8.00 GiB, other allocations: 1 KiB)", True),
        ("CUDA error: out of memory", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
    ids=["a CPU with Windows", "an Apple GPU", "a GPU that others have filled", "a bug"],
)
def test_a_lack_of_memory_is_known_wherever_it_is_met(text, expected):
    assert runs.is_out_of_memory(RuntimeError(text)) == expected


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        (lambda: None, None, []),
        (lambda: throw(UserError("no such\nthing")), 2, ["error: no such thing"]),
        (lambda: throw(Diverged("the loss is nan")), 1, ["error: the loss is nan"]),
        (lambda: send(signal.SIGINT), 130, ["Ctrl-C"]),
        (lambda: send(signal.SIGTERM), 143, ["SIGTERM"]),
        (lambda: send(signal.SIGUSR1), 138, ["SIGUSR1"]),
        (lambda: send_to_destructors(signal.SIGINT), 130, ["Ctrl-C"]),
        (lambda: send_to_destructors(signal.SIGTERM), 143, ["SIGTERM"]),
        (lambda: torch.empty(2**62, dtype=torch.uint8), 1, ["out of memory", "--batch-size"]),
        (lambda: throw(MemoryError()), 1, ["out of memory", "--batch-size"]),
    ],
    ids=[
        *("success", "mistake", "divergence", "Ctrl-C", "SIGTERM"),
        *("SIGUSR1", "Ctrl-C in destructors", "SIGTERM in destructors"),
        *("PyTorch's memory", "Python's memory"),
    ],
)
def test_exit_codes_and_the_command_to_go_on(
    tmp_path, monkeypatch, capsys, signals, act, code, words
):
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--output-dir", str(tmp_path), "--name", "run"])

    def main(config):
        with runs.open_run(config):
            act()

    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as left:
        runs.run_script(main, Config, "")
    lines = capsys.readouterr().err.splitlines()
    if code is None:
        assert lines == []
        return
    assert left.value.code == code
    (line,) = lines
    for word in words:
        assert word in line
    if words[0] == "error: the loss is nan":  # a resumed run would diverge again
        assert "--resume" not in line
        return
    # What is copied from "python" to the end of the line must work.
    command = shlex.split(line[line.index("python simclr.py") :])
    assert command[-2:] == ["--resume", str(tmp_path / "simclr" / "run")]


def test_other_errors_of_a_destructor_are_shown(monkeypatch, signals):
    class Broken:
        def __del__(self):
            raise ZeroDivisionError

    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    runs.exit_cleanly(Broken)
    assert [dropped.exc_type for dropped in shown] == [ZeroDivisionError]


def test_a_reader_that_goes_away_is_no_traceback():
    program = (
        "from support import runs; runs.exit_cleanly(lambda: [print(i) for i in range(10**6)])"
    )
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in errors


def test_bad_flag_exits_with_2_before_anything_is_done(monkeypatch, capsys, signals):
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--epochs", "many"])
    with pytest.raises(SystemExit) as left:
        runs.run_script(lambda config: pytest.fail("it started"), Config, "")
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--epochs" in line


def test_a_mistake_in_the_data_leaves_nothing_behind(tmp_path, monkeypatch, capsys, signals):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--dataset", "no/such/folder"])
    with pytest.raises(SystemExit) as left:
        runs.run_script(simclr.main, Config, "")
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "no/such/folder" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError("NCCL, says a user's code")])
def test_a_bug_keeps_its_traceback(monkeypatch, signals, error):
    monkeypatch.setattr(sys, "argv", ["simclr.py"])
    with pytest.raises(ZeroDivisionError if error is ZeroDivisionError else RuntimeError):
        runs.run_script(lambda config: throw(error), Config, "")


def test_another_process_that_died_is_one_line(monkeypatch, capsys, signals):
    monkeypatch.setattr(sys, "argv", ["simclr.py"])
    error = torch.distributed.DistBackendError("connection closed\nby a peer")
    with pytest.raises(SystemExit) as left:
        runs.run_script(lambda config: throw(error), Config, "")
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "another process" in line


def test_a_notebooks_output_will_do(monkeypatch, signals):
    shown = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=shown.append, flush=lambda: None))
    runs.exit_cleanly(lambda: print("done"))
    assert "".join(shown) == "done\n"


# loggers


def scalars(folder):
    """Every number that TensorBoard has as name: {step: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


class Recorder:
    """Stands in for Lightning's loggers, and for wandb's run."""

    def __init__(self, *_, **__):
        self.experiment = self
        self.calls = []
        made.append(self)

    def __getattr__(self, name):
        return lambda *arguments, **named: self.calls.append((name, *arguments, *named.values()))


made: list[Recorder] = []


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(None, "success", 0), (Diverged, "failed", 1), (KeyboardInterrupt, "failed", 1)],
)
def test_a_logger_is_told_how_the_run_ended(tmp_path, monkeypatch, logger, error, status, code):
    pytest.importorskip(logger)
    for name in ("TensorBoardLogger", "WandbLogger"):
        monkeypatch.setattr(pytorch_lightning.loggers, name, Recorder)
    made.clear()
    config = make_config(tmp_path, logger=logger)
    with pytest.raises(error) if error else contextlib.nullcontext(), runs.open_run(config) as run:
        run.log({"loss": 1.0, "cell": "gru"}, 3)
        if error:
            raise error
    (recorder,) = made
    assert ("log_metrics", {"loss": 1.0}, 3) in recorder.calls
    assert ("log_hyperparams", dataclasses.asdict(config)) in recorder.calls
    end = [call for call in recorder.calls if call[0] in ("finalize", "finish")]
    assert end == [("finalize", status), *([("finish", code)] if logger == "wandb" else [])]


def test_wandb_runs_of_one_process_are_two_and_in_their_folders(tmp_path, monkeypatch, request):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    request.addfinalizer(wandb.finish)
    for name, loss in (("a", 0.123456), ("b", 0.654321)):
        config = make_config(tmp_path / "results", name=name, logger="wandb")
        with runs.open_run(config) as run:
            run.log({"epoch": 1, "loss": loss}, 1)
    for name, loss, other in (("a", b"0.123456", b"0.654321"), ("b", b"0.654321", b"0.123456")):
        folder = tmp_path / "results" / "simclr" / name
        (written,) = folder.glob("wandb/offline-run-*/*.wandb")
        until = time.monotonic() + 30  # a process of wandb's own writes the file
        while loss not in written.read_bytes() and time.monotonic() < until:
            time.sleep(0.1)
        assert loss in written.read_bytes()
        assert other not in written.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_that_a_folder_is_older_is_said_once(tmp_path, capsys):
    with runs.open_run(make_config(tmp_path)) as run:
        pass
    record = files.read_json(run.folder / "config.json")
    del record["views"]
    files.write_json(run.folder / "config.json", record)
    with runs.open_run(resume(run.folder)):
        pass
    said = f"{run.folder} is of an older version, which did what this one does with --views 2\n"
    assert capsys.readouterr().out == said


def test_runs_of_one_name_have_pages_of_their_own_on_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pages = []

    class Paged(Recorder):
        def __init__(self, *arguments, **named):
            super().__init__()
            pages.append(named["id"])

    monkeypatch.setattr(pytorch_lightning.loggers, "WandbLogger", Paged)
    times = iter(f"2026-11-28 08:00:{second:02}" for second in range(60))
    monkeypatch.setattr(runs.time, "strftime", lambda form: next(times))
    config = make_config(tmp_path / "here", logger="wandb")
    for each in (config, make_config(tmp_path / "there", logger="wandb")):
        with runs.open_run(each) as run:
            pass
    with runs.open_run(resume(run.folder)):
        pass
    assert pages[0] != pages[1] == pages[2]


def test_wandb_without_a_network_is_one_line(tmp_path, monkeypatch, user_error):
    wandb = pytest.importorskip("wandb")

    class Alone:
        def __init__(self, *_, **__):
            pass

        @property
        def experiment(self):
            raise wandb.errors.CommError("cannot reach the server")

    monkeypatch.setattr(pytorch_lightning.loggers, "WandbLogger", Alone)
    opened = runs.open_run(make_config(tmp_path, logger="wandb"))
    with user_error("cannot reach the server", "WANDB_MODE=offline"), opened:
        pass


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_there_is_a_folder(
    tmp_path, monkeypatch, user_error, logger
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    opened = runs.open_run(make_config(tmp_path, logger=logger))
    with user_error(f"pip install {logger}"):
        opened.__enter__()
    assert list(tmp_path.iterdir()) == []


# what the scripts send


def table(folder):
    """Every number of `metrics.csv` as name: {epoch: value}."""
    columns = {}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        for name, value in row.items():
            if value and name != "verdict":  # which is in words
                values = columns.setdefault(name, {})
                values[int(row["epoch"])] = pytest.approx(float(value), rel=1e-6)
    return columns


@pytest.mark.usefixtures("unrendered_pictures")
def test_tensorboard_has_the_numbers_of_a_pretraining_that_was_stopped(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    values = {"encoder": "small", "stages": "pretrain,probe", "epochs": 3, "batch_size": 256}
    values |= {"knn_every": 2, "probe_epochs": 2, "few_labels": 2, "logger": "tensorboard"}
    config = make_config(tmp_path, **values)
    mean = progress.EpochLoss.mean

    def stopping(losses):
        if losses.epoch == 3:
            raise KeyboardInterrupt
        return mean(losses)

    monkeypatch.setattr(progress.EpochLoss, "mean", stopping)
    with pytest.raises(KeyboardInterrupt):
        simclr.main(config)
    folder = tmp_path / "simclr" / "run"
    assert list(scalars(folder)["loss"]) == [1, 2]  # written although the run was stopped
    monkeypatch.setattr(progress.EpochLoss, "mean", mean)
    summary = simclr.main(dataclasses.replace(config, resume=str(folder)))
    expected = table(folder)
    assert {"epoch", "loss", "learning_rate", "embedding_std", "knn_held_out"} <= expected.keys()
    assert expected["knn_held_out"].keys() == {2, 3}
    logged = scalars(folder)
    assert {name: logged[name] for name in expected} == expected
    for name in ("final_loss", "linear_probe_accuracy", "knn_accuracy"):
        assert logged[f"final/{name}"] == {3: pytest.approx(summary[name])}
    few = summary["few_label_accuracy_encoder"]
    assert logged["final/few_label_accuracy_encoder/mean"] == {3: pytest.approx(few["mean"])}


@pytest.mark.usefixtures("unrendered_pictures")
def test_tensorboard_has_the_numbers_of_each_cell(tmp_path):
    pytest.importorskip("tensorboard")
    values = {"dataset": "digits", "cells": "rnn,gru", "hidden_size": 8, "epochs": 2}
    values |= {"output_dir": str(tmp_path), "name": "run", "device": "cpu"}
    summary = rnn.main(rnn.Config(**values, logger="tensorboard"))
    folder = tmp_path / "rnn" / "run"
    expected = {}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        for name in row.keys() - {"cell"}:
            values = expected.setdefault(f"{row['cell']}_{name}", {})
            values[int(row["epoch"])] = pytest.approx(float(row[name]), rel=1e-6)
    assert len(expected) == 16
    found = scalars(folder)
    assert {name: found[name] for name in expected} == expected
    for cell in ("rnn", "gru"):
        accuracy = pytest.approx(summary[f"{cell}_test_accuracy"])
        assert found[f"final/{cell}_test_accuracy"] == {2: accuracy}


@pytest.mark.usefixtures("unrendered_pictures")
def test_tensorboard_has_the_trials_of_a_sweep(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(tune.SPACE, "hidden_size", [8, 16, 32])
    config = tune.Config(
        dataset="digits",
        cell="rnn",
        trials=2,
        max_epochs=1,
        output_dir=str(tmp_path),
        name="run",
        device="cpu",
        logger="tensorboard",
    )
    tune.main(config)
    folder = tmp_path / "rnn_hyperparameter_tune" / "run"
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    found = scalars(folder)
    for name in ("validation_loss", "hidden_size", "learning_rate"):
        expected = {i: pytest.approx(float(row[name]), rel=1e-6) for i, row in enumerate(rows)}
        assert found[name] == expected
