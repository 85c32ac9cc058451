import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import functions
import hubconf
import simclr

ROOT = Path(hubconf.__file__).resolve().parent
SHIPPED = ROOT / "docs" / "results" / "simclr-digits"


def load(name, *arguments, **named):
    return torch.hub.load(str(ROOT), name, *arguments, source="local", **named)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run in float32, and the test images that it embedded, as floats in [0, 1]."""
    home = tmp_path_factory.mktemp("hub")
    config = simclr.Config(
        dataset="digits",
        output_dir=str(home),
        name="run",
        encoder="small",
        epochs=1,
        batch_size=256,
        knn_every=0,
        stages="pretrain,embed",
        device="cpu",
        precision="float32",
    )
    simclr.main(config)
    run = home / "simclr" / "run"
    features = torch.from_numpy(np.load(run / "embeddings.npz")["features"])
    images = functions.load_images("digits").test.images.float() / 255
    return SimpleNamespace(home=home, run=run, images=images, features=features)


@pytest.mark.parametrize("name", ["", "encoder.safetensors"])
def test_torch_hub_gives_the_encoder_that_was_saved(trained, name):
    encoder = load("encoder", weights=str(trained.run / name))
    assert not any(module.training for module in encoder.modules())
    assert (encoder.num_features, encoder.image_size) == (128, 8)
    saved = load_file(trained.run / "encoder.safetensors")
    own = {key.partition(".")[2]: value for key, value in encoder.state_dict().items()}
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[key], saved[key]) for key in saved)
    with torch.no_grad():
        assert torch.equal(encoder(trained.images), trained.features)


def test_a_wrong_path_is_one_line(trained, user_error):
    with user_error("nowhere"):
        load("encoder", weights=str(trained.home / "nowhere"))
    with user_error("no encoder.safetensors"):
        load("encoder", weights=str(trained.home))


def test_a_process_elsewhere_loads_it(trained, tmp_path):
    code = (
        "import sys, torch\n"
        "encoder = torch.hub.load(sys.argv[1], 'encoder', source='local', weights=sys.argv[2])\n"
        "print(tuple(encoder(torch.rand(3, 1, 8, 8)).shape))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), "run"]
    (tmp_path / "run").symlink_to(trained.run)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "(3, 128)\n"), done.stderr


def test_the_entry_points_are_all_that_can_be_called():
    # torch.hub.list shows whatever can be called and does not begin with an underscore.
    names = [name for name in vars(hubconf) if callable(getattr(hubconf, name))]
    assert [name for name in names if not name.startswith("_")] == ["encoder", "simclr_digits"]
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)


def test_the_shipped_encoder_is_that_of_the_committed_result():
    assert (SHIPPED / "encoder.safetensors").stat().st_size < 1_000_000
    encoder, data = load("simclr_digits"), functions.load_images("digits")
    with torch.no_grad():
        train, test = (encoder(part.images / 255) for part in (data.train, data.test))
    found = functions.knn_accuracy(train, data.train.labels, test, data.test.labels)
    summary = json.loads((SHIPPED / "summary.json").read_text())
    # The result may have been computed in bfloat16: an image or two may fall to another class.
    assert found == pytest.approx(summary["knn_accuracy"], abs=0.006)
