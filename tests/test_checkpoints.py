import dataclasses
import hashlib
import io
import math
import os
import pickle
import random
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from simclr import Config
from support import checkpoints, encoders
from support.errors import Diverged, UserError


def make_model(seed=0, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 4))
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def train(model, optimizer, steps=range(3)):
    for step in steps:
        batch = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


HISTORY = [
    {"epoch": 1, "loss": 1 / 3, "seconds": 0.5},
    {"epoch": 2, "loss": 0.1, "seconds": 0.25, "knn_held_out": 1e-17},
]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with its model and optimizer."""
    model, optimizer = make_model()
    train(model, optimizer)
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    checkpoints.save(path, 2, model, optimizer, HISTORY, Config(epochs=7))
    return path, model, optimizer


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_checkpoint_is_saved_when_it_is_due_and_after_the_last_epoch(monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(checkpoints, "save", lambda path, epoch, *rest: saved.append(epoch))
    config = SimpleNamespace(epochs=10, checkpoint_seconds=60.0)
    saver = checkpoints.Saver(None, None, None, config)
    for epoch in range(1, 11):
        now[0] += 25
        saver.save(epoch, [])
    assert saved == [3, 6, 9, 10]


def test_restored_run_goes_on_as_if_never_stopped(saved):
    path, model, optimizer = saved
    model2, optimizer2 = make_model(seed=1)
    assert not equal(model.state_dict(), model2.state_dict())
    assert checkpoints.restore(path, model2, optimizer2) == (2, HISTORY)
    assert equal(model.state_dict(), model2.state_dict())  # also BatchNorm's statistics
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        momentum = optimizer.state[a]["momentum_buffer"]
        assert momentum.abs().max() > 0
        assert torch.equal(momentum, optimizer2.state[b]["momentum_buffer"])
    train(model, optimizer, range(3, 6))
    train(model2, optimizer2, range(3, 6))
    assert equal(model.state_dict(), model2.state_dict())


def test_later_training_does_not_reach_the_checkpoint_or_its_config(saved):
    path, model, optimizer = saved
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizer)
    state = checkpoints.load(path)
    assert equal(state["model"], before)
    assert state["config"] == dataclasses.asdict(Config(epochs=7))


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(saved, name, value):
    _, model, optimizer = saved
    checkpoints.check_finite(3, model, optimizer)
    model.state_dict()[name].view(-1)[3] = value
    with pytest.raises(Diverged, match=rf"{name} is not finite after epoch 3"):
        checkpoints.check_finite(3, model, optimizer)


def test_a_momentum_that_is_not_finite_is_noticed(saved):
    _, model, optimizer = saved
    optimizer.state[model[2].bias]["momentum_buffer"][1] = math.nan
    with pytest.raises(Diverged, match="momentum_buffer"):
        checkpoints.check_finite(3, model, optimizer)


class Payload:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def seal(content):
    """With a right checksum, so that what is inside has to be checked."""
    content = content[:-2]
    return content + b"\x40\x00" + hashlib.sha256(content).hexdigest().encode()


def torch_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return seal(buffer.getvalue())


def zip_file(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return seal(buffer.getvalue())


def without(name):
    return lambda good: torch_file(
        {k: v for k, v in torch.load(io.BytesIO(good)).items() if k != name}
    )


SPOILED = {
    "empty": lambda good: b"",
    "a byte": lambda good: good[:1],
    "a tenth": lambda good: good[: len(good) // 10],
    "half": lambda good: good[: len(good) // 2],
    "without its end": lambda good: good[:-1],
    "zeros": lambda good: bytes(len(good)),
    "zeroed half": lambda good: good[: len(good) // 2] + bytes(len(good) // 2),
    "random": lambda good: random.Random(0).randbytes(len(good)),
    "text": lambda good: b"not a checkpoint\n",
    "a zip of text": lambda good: zip_file(readme="hello"),
    "an empty zip": lambda good: zip_file(),
    "a pickled dict": lambda good: pickle.dumps({"epoch": 1}),
    "a list": lambda good: torch_file([1, 2]),
    "a tensor": lambda good: torch_file(torch.zeros(3)),
    "weights only": lambda good: torch_file(make_model()[0].state_dict()),
    "a whole module": lambda good: torch_file(make_model()[0]),
    **{f"without {name}": without(name) for name in ("epoch", "model", "optimizer", "history")},
    "weights of no kind": lambda good: torch_file(
        {**torch.load(io.BytesIO(good)), "model": [1], "optimizer": None}
    ),
    "optimizer of no kind": lambda good: torch_file(
        {**torch.load(io.BytesIO(good)), "optimizer": "sgd"}
    ),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_spoiled_checkpoint_is_refused(saved, user_error, spoil):
    path, model, optimizer = saved
    path.write_bytes(spoil(path.read_bytes()))
    with user_error(path):
        checkpoints.restore(path, model, optimizer)


def test_a_flip_anywhere_is_refused(saved):
    path, *_ = saved
    good = path.read_bytes()
    for position in range(0, len(good), len(good) // 120):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        with pytest.raises(UserError, match="checksum"):
            checkpoints.load(path)


@pytest.mark.parametrize("kind", ["pickle", "torch, old format", "torch", "inside a checkpoint"])
def test_code_in_a_checkpoint_is_not_run(saved, tmp_path, user_error, kind):
    path, model, optimizer = saved
    payload = Payload(tmp_path / "canary")
    if kind == "pickle":
        path.write_bytes(seal(pickle.dumps(payload) + b".."))
    elif kind == "inside a checkpoint":
        path.write_bytes(torch_file({**checkpoints.load(path), "history": payload}))
    else:
        buffer = io.BytesIO()
        torch.save(payload, buffer, _use_new_zipfile_serialization=kind == "torch")
        path.write_bytes(seal(buffer.getvalue() + b".." * (kind != "torch")))
    with user_error(path):
        checkpoints.restore(path, model, optimizer)
    assert not (tmp_path / "canary").exists()
    if kind != "pickle":
        torch.load(path, weights_only=False)
        assert (tmp_path / "canary").exists()  # the payload was a live one


def test_a_missing_checkpoint_is_named(saved, user_error):
    path, model, optimizer = saved
    for other in (path.with_name("none.pt"), path.parent):
        with user_error(other):
            checkpoints.restore(other, model, optimizer)


def test_checkpoint_of_another_model_or_optimizer_is_refused(saved, user_error):
    path, model, _ = saved
    shallower, deeper = nn.Sequential(*model[:2]), nn.Sequential(*model, nn.Linear(4, 4))
    for other in (make_model(width=17)[0], shallower, deeper):
        with user_error(path):
            checkpoints.restore(path, other)
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    with user_error(path):
        checkpoints.restore(path, model, torch.optim.SGD(groups, 0.1, momentum=0.9))


def changed_state(good, number, change):
    """The checkpoint with another momentum of one weight."""
    state = torch.load(io.BytesIO(good))
    values = state["optimizer"]["state"][number]
    values["momentum_buffer"] = change(values["momentum_buffer"])
    return torch_file(state)


SHAPES = {
    "shorter": lambda momentum: momentum[:-1],
    "one number": lambda momentum: momentum.sum(),
    "transposed": lambda momentum: momentum.T,
    "float64": lambda momentum: momentum.double(),
    "sparse": lambda momentum: momentum.to_sparse(),
}


# A fused optimizer would read beyond the end of a momentum that is too short.
@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_a_momentum_of_another_shape_is_refused_before_the_optimizer_has_it(
    saved, user_error, change
):
    path, model, _ = saved
    path.write_bytes(changed_state(path.read_bytes(), 0, change))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    with user_error(path, "does not fit"):
        checkpoints.restore(path, model, optimizer)
    assert not optimizer.state


def test_a_weight_of_another_type_is_refused(saved, user_error):
    path, model, _ = saved
    state = torch.load(io.BytesIO(path.read_bytes()))
    state["model"]["0.weight"] = state["model"]["0.weight"].double()
    path.write_bytes(torch_file(state))
    with user_error(path, "float64"):
        checkpoints.restore(path, model)


# weights for elsewhere


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_encoder_is_read_back_by_safetensors(tmp_path, layout):
    encoder = encoders.make_encoder("small", "cifar", 3, 8).to(memory_format=layout)
    encoder(torch.rand(4, 3, 8, 8))  # moves BatchNorm's statistics off their start
    path = tmp_path / "encoder.safetensors"
    checkpoints.save_weights(path, encoder, {"encoder": "small"})
    state = load_file(path)
    assert equal(state, encoder.state_dict())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"encoder": "small"}
    other = encoders.make_encoder("small", "cifar", 3, 8)
    other.load_state_dict(state)
    images = torch.rand(4, 3, 8, 8)
    assert torch.allclose(other.eval()(images), encoder.eval()(images), atol=1e-6)


def test_tensors_and_what_is_said_of_them_come_back(tmp_path):
    path = tmp_path / "probe.safetensors"
    tensors = {"weight": torch.randn(3, 4).T, "bias": torch.arange(3)}
    checkpoints.save_tensors(path, tensors, {"about": '{"classes": ["ä", "$b"]}'})
    found, about = checkpoints.load_tensors(path)
    assert equal(found, tensors)
    assert about == {"classes": ["ä", "$b"]}
    checkpoints.save_tensors(path, tensors, {})
    assert checkpoints.load_tensors(path)[1] == {}


def test_damaged_tensors_are_named(tmp_path, user_error):
    path = tmp_path / "a.safetensors"
    with user_error(path, "No such file"):
        checkpoints.load_tensors(path)
    checkpoints.save_tensors(path, {"a": torch.ones(100)}, {"about": "[]"})
    with user_error(path, "about"):
        checkpoints.load_tensors(path)
    whole = path.read_bytes()
    for content in (b"", b"no tensors", whole[:-1], whole[:50], b"\xff" * len(whole)):
        path.write_bytes(content)
        with user_error(path):
            checkpoints.load_tensors(path)
    with user_error(tmp_path):
        checkpoints.load_tensors(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_of_elsewhere_are_taken_where_they_fit(tmp_path, kind):
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.head = nn.Linear(2, 2)
    path = tmp_path / f"weights.{kind}"
    for given, taken in ((source, 4), (other, 2)):
        if kind == "pth":
            torch.save(given.state_dict(), path)
        else:
            checkpoints.save_weights(path, given, {})
        before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
        line = checkpoints.load_weights(path, model)
        assert line.startswith(f"{taken} of the encoder's 4 tensors")
        assert ("new are 1.weight, 1.bias" in line) == (given is other)
        for name, value in model.encoder.state_dict().items():
            fits = given is source or name.startswith("0.")
            assert torch.equal(value, (given.state_dict() if fits else before)[name])


def test_weights_that_cannot_be_taken_are_one_line(tmp_path, user_error):
    model = nn.Linear(3, 4)
    with user_error("no weights at", "missing.pth"):
        checkpoints.load_weights(tmp_path / "missing.pth", model)
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with user_error(name):
            checkpoints.load_weights(tmp_path / name, model)
    torch.save({"weight": torch.ones(4, 5), "epoch": 3}, tmp_path / "other.pth")
    with user_error("nothing in", "names and shapes"):
        checkpoints.load_weights(tmp_path / "other.pth", model)
    torch.save(model, tmp_path / "module.pth")  # which only a pickle's code could build
    with user_error("without running code"):
        checkpoints.load_weights(tmp_path / "module.pth", model)
