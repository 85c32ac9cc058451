"""The same command gives the same bits, and what is not part of the result does not change it."""

from pathlib import Path

import pytest
from commands import FLAGS, Commands, differences, result

pytestmark = pytest.mark.slow

SCRIPTS = sorted(FLAGS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The finished run of a script with further flags; each is made once."""
    commands, known = Commands(tmp_path_factory.mktemp("runs")), {}

    def run(script: str, *flags: str, again: str = "") -> Path:
        key = " ".join((script, *flags, again))
        if key not in known:
            name = f"run{len(known)}"
            start = [f"{script}.py", *FLAGS[script], *flags, "--name", name]
            code, _, errors = commands.run(start)
            assert code == 0, errors
            known[key] = commands.folder / "results" / script / name
        return known[key]

    return run


def weights(found: dict) -> dict:
    return {name: value for name, value in found.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_seed_in_two_processes_gives_the_same_bits(made, script):
    one, other = result(made(script)), result(made(script, again="a second time"))
    assert len(weights(one)) == {"rnn": 2, "simclr": 3, "simsiam": 2, "moco": 3}[script]
    assert ("embeddings.npz" in one) == (script != "rnn")
    assert differences(one, other) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_seed_gives_other_weights_and_numbers(made, script):
    one, other = result(made(script)), result(made(script, "--seed", "1"))
    changed = differences(one, other)
    assert set(weights(one)) <= set(changed)
    assert {"metrics.csv", "summary"} <= set(changed)


@pytest.mark.parametrize("script", ["simclr", "simsiam", "moco"])
@pytest.mark.parametrize("every", ["0", "1"])
def test_knn_checks_change_nothing_else(made, script, every):
    found = [result(made(script)), result(made(script, "--knn-every", every))]
    for one in found:
        for row in one["metrics.csv"]:
            row.pop("knn_held_out", None)
    assert differences(*found) == []


@pytest.mark.parametrize("script", ["simclr", "simsiam", "moco"])
def test_later_stages_and_their_pictures_change_nothing_before_them(made, script):
    whole, alone = result(made(script)), result(made(script, "--stages", "pretrain"))
    for name in ("encoder.safetensors", "metrics.csv"):
        assert alone[name] == whole[name]
    assert alone["summary"]["final_loss"] == whole["summary"]["final_loss"]


@pytest.mark.parametrize(
    ("script", "stage"),
    [
        *(("simclr", stage) for stage in ("probe", "embed", "finetune")),
        *(("simsiam", stage) for stage in ("probe", "embed")),
        *(("moco", stage) for stage in ("probe", "embed", "finetune")),
    ],
)
def test_a_stage_does_not_depend_on_the_stages_before_it(made, script, stage):
    whole, alone = result(made(script)), result(made(script, "--stages", f"pretrain,{stage}"))
    names = {
        "probe": ["probe.csv", "predictions.npz"],
        "embed": ["embeddings.npz"],
        "finetune": ["finetune.csv", "finetuned_encoder.safetensors"],
    }
    for name in ("encoder.safetensors", *names[stage]):
        assert alone[name] == whole[name], name
    for key, value in alone["summary"].items():
        assert whole["summary"][key] == value, key


def test_a_finished_run_that_is_evaluated_again_says_the_same(made, tmp_path):
    commands, folder = Commands(tmp_path), made("simclr", again="to be evaluated again")
    before = result(folder)
    flags = ["--stages", "probe,embed,finetune"]
    assert commands.run(["simclr.py", "--resume", str(folder), *flags])[0] == 0
    assert differences(before, result(folder)) == []
