"""Whole command lines that are killed, stopped or started twice, and what they leave behind."""

import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from commands import (
    FLAGS,
    Commands,
    command_to_go_on,
    differences,
    last_words,
    result,
)
from PIL import Image

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("FAULT_COUNT", "50"))
STOPS = int(os.environ.get("FAULT_STOPS", min(30, KILLS)))
SEED = int(os.environ.get("FAULT_SEED", "0"))
SCRIPTS = sorted(FLAGS)
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}
SHORT = [*FLAGS["simclr"][: FLAGS["simclr"].index("--stages")], "--stages", "pretrain"]
SHORT += ["--epochs", "1"]


def share(count: int, script: str) -> int:
    """A script's part of `count`; the parts of all scripts add up to it."""
    place = SCRIPTS.index(script)
    return count // len(SCRIPTS) + (place < count % len(SCRIPTS))


@pytest.fixture
def commands(tmp_path):
    made = Commands(tmp_path)
    yield made
    made.close()


@dataclasses.dataclass
class Reference:
    """An uninterrupted run: its result, its writes in their order, and its length in seconds."""

    result: dict
    writes: list[str]
    seconds: float  # from the moment at which it answers signals


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The uninterrupted run of a script, made when it is first asked for."""
    made = {}

    def get(script):
        if script not in made:
            commands = Commands(tmp_path_factory.mktemp(script))
            command = commands.start([f"{script}.py", *FLAGS[script], "--name", "whole"])
            code, _, errors = command.finish()
            assert code == 0, errors
            (began, _), *rest = command.noted()
            writes = [what.removeprefix("wrote ") for _, what in rest]
            folder = commands.folder / "results" / script / "whole"
            made[script] = Reference(result(folder), writes, rest[-1][0] - began)
        return made[script]

    return get


def run_folder(commands: Commands, script: str, name: str) -> Path:
    return commands.folder / "results" / script / name


def arguments(commands: Commands, script: str, name: str) -> list[str]:
    """A first start of the run, or its continuation."""
    folder = run_folder(commands, script, name)
    if (folder / "config.json").exists():
        return [f"{script}.py", "--resume", str(folder)]
    return [f"{script}.py", *FLAGS[script], "--name", name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_moments_it_ends_like_the_uninterrupted_run(commands, references, script):
    draw, whole = random.Random(f"kill {SEED} {script}"), references(script)
    wanted, kills, runs, wrong = share(KILLS, script), 0, 0, []
    while kills < wanted:
        name, killed = f"run{runs}", 0
        runs += 1
        assert runs <= 3 * wanted, "the runs end before they can be killed"
        for _ in range(min(draw.randint(1, 3), wanted - kills)):
            command = commands.start(arguments(commands, script, name))
            command.wait_for("ready")
            if not command.runs_for(draw.uniform(0, whole.seconds / (1 + killed))):
                break
            command.kill()
            killed += command.process.returncode == -signal.SIGKILL
        kills += killed
        code, _, errors = commands.run(arguments(commands, script, name))
        if code:
            wrong.append(f"{name}, killed {killed} times: exit code {code}, {errors}")
            continue
        found = result(run_folder(commands, script, name))
        if other := differences(found, whole.result):
            wrong.append(f"{name}, killed {killed} times, differs in {', '.join(other)}")
    print(f"{script}: {kills} kills of {runs} runs")
    assert not wrong


@pytest.mark.parametrize("part", ["half", "before", "after"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_during_a_write_it_ends_like_the_uninterrupted_run(
    commands, references, script, part
):
    draw, whole = random.Random(f"write {SEED} {script} {part}"), references(script)
    # Checkpoints first, then every other kind of file.
    places = [n for n, name in enumerate(whole.writes, 1) if name == "checkpoint.pt"]
    draw.shuffle(places)
    rest = [n for n, name in enumerate(whole.writes, 1) if name != "checkpoint.pt"]
    chosen = [*places[:2], *draw.sample(rest, len(rest))][: max(1, KILLS // 9)]
    wrong = []
    for place in chosen:
        name = f"run{place}"
        first = arguments(commands, script, name)
        command = commands.start(first, kill_at=place, part=part)
        code, _, errors = command.finish()
        assert code == -signal.SIGKILL, errors
        code, _, errors = commands.run(arguments(commands, script, name))
        if code:
            wrong.append(f"killed at write {place}: exit code {code}, {errors}")
            continue
        found = result(run_folder(commands, script, name))
        if other := differences(found, whole.result):
            wrong.append(f"killed at {whole.writes[place - 1]} ({place}): {', '.join(other)}")
    assert not wrong


def test_a_checkpoint_that_is_kept_is_not_lost_by_a_kill(commands, references):
    # checkpoint.pt and checkpoints/epoch2.pt are two writes; the kill comes between them.
    whole = references("simclr")
    place = whole.writes.index("epoch2.pt")
    place = max(n for n, name in enumerate(whole.writes[:place], 1) if name == "checkpoint.pt")
    start = arguments(commands, "simclr", "run")
    assert commands.run(start, kill_at=place, part="after")[0] == -signal.SIGKILL
    assert commands.run(arguments(commands, "simclr", "run"))[0] == 0
    files = result(run_folder(commands, "simclr", "run"))["files"]
    assert [name for name in files if name.startswith("checkpoints")] == [
        "checkpoints/epoch2.pt",
        "checkpoints/epoch4.pt",
    ]


def test_killed_before_its_config_a_named_run_starts_anew(commands):
    # A batch system that starts the same command again must not be refused by an empty folder.
    start = ["simclr.py", *SHORT, "--name", "run"]
    assert commands.run(start, kill_at=1, part="before")[0] == -signal.SIGKILL
    assert not (run_folder(commands, "simclr", "run") / "config.json").exists()
    assert commands.run(start)[0] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_by_a_signal_it_says_how_to_go_on_and_ends_alike(commands, references, script):
    limit = float(os.environ.get("FAULT_SECONDS", "5"))
    draw, whole = random.Random(f"stop {SEED} {script}"), references(script)
    wrong, sent, stopped, first = [], 0, 0, SCRIPTS.index(script)
    for turn in range(share(STOPS, script)):
        number = list(SIGNALS)[(first + turn) % len(SIGNALS)]
        name, delay = f"run{turn}", draw.uniform(0, whole.seconds)
        folder = run_folder(commands, script, name)
        command = commands.start(arguments(commands, script, name))
        command.wait_for("ready")
        running, began = command.runs_for(delay), time.monotonic()
        sent += running
        if running and number == signal.SIGINT:  # the terminal sends it to the whole group
            os.killpg(command.process.pid, number)
        elif running:
            command.process.send_signal(number)
        code, _, errors = command.finish()
        took, what = time.monotonic() - began, f"{name}, {number.name} after {delay:.2f} s"
        if code and took > limit:
            wrong.append(f"{what}: took {took:.1f} s")
        if code == 128 + number:
            stopped += 1
            if len(last_words(errors)) != 1 or SIGNALS[number] not in last_words(errors)[0]:
                wrong.append(f"{what}: {errors or 'no line'}")
            elif (folder / "config.json").exists() and (
                commands.folder / command_to_go_on(errors)[-1] != folder
            ):
                wrong.append(f"{what}: another command to go on: {errors}")
        elif code:  # 0: the run was over, or the signal came within another library's callback
            wrong.append(f"{what}: exit code {code}, {errors}")
        code, _, errors = commands.run(arguments(commands, script, name))
        if code:
            wrong.append(f"{what}, resumed: exit code {code}, {errors}")
        elif other := differences(result(folder), whole.result):
            wrong.append(f"{what}, resumed: differs in {', '.join(other)}")
    print(f"{script}: {stopped} of {sent} signals stopped a run")
    assert not wrong
    assert stopped >= sent // 2


def test_two_runs_without_a_name_get_folders_of_their_own(commands, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    pair = [commands.start(["simclr.py", *SHORT], meeting=meeting) for _ in range(2)]
    assert [command.finish()[0] for command in pair] == [0, 0]
    one, other = (tmp_path / "results" / "simclr").iterdir()
    assert differences(result(one), result(other)) == []


def test_of_two_runs_with_the_same_name_one_is_refused(commands, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    flags = ["simclr.py", *SHORT, "--name", "run"]
    pair = [commands.start(flags, meeting=meeting) for _ in range(2)]
    ends = sorted(command.finish() for command in pair)
    assert [code for code, _, _ in ends] == [0, 2]
    (line,) = last_words(ends[1][2])
    assert str(Path("results") / "simclr" / "run") in line
    assert [path.name for path in (tmp_path / "results" / "simclr").iterdir()] == ["run"]


def test_a_run_is_not_resumed_while_it_runs(commands, references):
    folder = run_folder(commands, "rnn", "run")
    command = commands.start(arguments(commands, "rnn", "run"))
    command.wait_for("wrote checkpoint.pt")
    os.killpg(command.process.pid, signal.SIGSTOP)  # it stays in the middle of the training
    try:
        code, _, errors = commands.run(arguments(commands, "rnn", "run"))
    finally:
        os.killpg(command.process.pid, signal.SIGCONT)
    assert command.finish()[0] == 0
    assert code == 2
    (line,) = last_words(errors)
    assert str(folder) in line
    assert differences(result(folder), references("rnn").result) == []


def test_an_image_cache_that_two_processes_build_at_once_is_right(commands, tmp_path):
    draw, folder = np.random.default_rng(SEED), tmp_path / "images"
    for number in range(100):
        path = folder / f"train/{('cat', 'dog')[number % 2]}/{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    pictures = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in folder.rglob("*.png")]
    wanted = sorted(picture.tobytes() for picture in pictures)  # test images come last there
    flags = ["simclr.py", "--dataset", str(folder), "--image-size", "16", "--device", "cpu"]
    flags += ["--encoder", "small", "--epochs", "1", "--batch-size", "32", "--stages", "pretrain"]
    for turn in range(max(1, KILLS // 10)):
        place = tmp_path / f"data{turn}"
        pair = [commands.start([*flags, "--data-dir", str(place)]) for _ in range(2)]
        assert [command.finish()[0] for command in pair] == [0, 0]
        # Only the cache and its checksum: nothing of either process is left over.
        cache = sorted((place / "cache").iterdir())
        assert [path.suffix for path in cache] == [".json", ".npy"]
        assert sorted(picture.tobytes() for picture in np.load(cache[1])) == wanted
