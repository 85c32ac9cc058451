"""The same command gives the same bits, and what is not part of the result does not change it."""

from pathlib import Path

import pytest
import torch
from commands import FLAGS, Commands, differences, result

import functions
import simclr
import simsiam

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
            assert (code, errors) == (0, "")
            known[key] = commands.folder / "results" / script / name
        return known[key]

    return run


def weights(found: dict) -> dict:
    return {name: value for name, value in found.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_seed_in_two_processes_gives_the_same_bits(made, script):
    one, other = result(made(script)), result(made(script, again="a second time"))
    assert len(weights(one)) == {"rnn": 2, "simclr": 2, "simsiam": 1}[script]
    assert ("embeddings" in one) == (script != "rnn")
    assert differences(one, other) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_seed_gives_other_weights_and_numbers(made, script):
    one, other = result(made(script)), result(made(script, "--seed", "1"))
    changed = differences(one, other)
    assert set(weights(one)) <= set(changed)
    assert {"metrics.csv", "summary"} <= set(changed)


@pytest.mark.parametrize("script", ["simclr", "simsiam"])
@pytest.mark.parametrize("every", ["0", "1"])
def test_knn_checks_change_nothing_else(made, script, every):
    found = [result(made(script)), result(made(script, "--knn-every", every))]
    for one in found:
        for row in one["metrics.csv"]:
            row.pop("knn_held_out", None)
    assert differences(*found) == []


@pytest.mark.parametrize("script", ["simclr", "simsiam"])
def test_later_stages_and_their_pictures_change_nothing_before_them(made, script):
    whole, alone = result(made(script)), result(made(script, "--stages", "pretrain"))
    for name in ("encoder.safetensors", "metrics.csv"):
        assert alone[name] == whole[name]
    assert alone["summary"]["final_loss"] == whole["summary"]["final_loss"]


@pytest.mark.parametrize(
    ("script", "stage"),
    [
        *(("simclr", stage) for stage in ("probe", "embed", "finetune", "study")),
        *(("simsiam", stage) for stage in ("probe", "embed", "study")),
    ],
)
def test_a_stage_does_not_depend_on_the_stages_before_it(made, script, stage):
    whole, alone = result(made(script)), result(made(script, "--stages", f"pretrain,{stage}"))
    names = {
        "probe": ["probe.csv"],
        "embed": ["embeddings"],
        "finetune": ["finetune.csv", "finetuned_encoder.safetensors"],
        "study": ["label_efficiency.csv"],
    }
    for name in ("encoder.safetensors", *names[stage]):
        assert alone[name] == whole[name], name
    for key, value in alone["summary"].items():
        assert whole["summary"][key] == value, key


def test_a_finished_run_that_is_evaluated_again_says_the_same(made, tmp_path):
    commands, folder = Commands(tmp_path), made("simclr", again="to be evaluated again")
    before = result(folder)
    (folder / "label_efficiency.csv").unlink()  # or the study would take its rows
    flags = ["--stages", "probe,embed,finetune,study"]
    code, _, errors = commands.run(["simclr.py", "--resume", str(folder), *flags])
    assert (code, errors) == (0, "")
    assert differences(before, result(folder)) == []


@pytest.mark.parametrize("script", ["simclr", "simsiam"])
@pytest.mark.parametrize("batch_size", [1797, 333, 37, 1])
def test_features_do_not_depend_on_the_number_of_batches(made, script, batch_size):
    folder = made(script)
    config = functions.load_config({"simclr": simclr, "simsiam": simsiam}[script].Config, folder)
    data = functions.load_images("digits", folder, 32, None)
    mean, std = functions.channel_statistics(data.train.images)
    encoder = functions.make_encoder(config.encoder, config.stem, *data.train.images.shape[1:3])
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    prefix = "encoder."
    encoder.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    encoder = encoder.to(memory_format=torch.channels_last)
    fabric = functions.make_fabric("cpu", config.precision)
    usual = functions.extract_features(encoder, data.train.images, mean, std, fabric)
    other = functions.extract_features(
        encoder, data.train.images, mean, std, fabric, batch_size=batch_size
    )
    if batch_size > 1:
        assert torch.equal(usual, other), f"they differ by up to {(usual - other).abs().max():.1e}"
    else:  # libraries have kernels of their own for one image
        torch.testing.assert_close(usual, other, atol=0.02, rtol=0.02)  # bfloat16 has 8 bits
