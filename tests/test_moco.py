import collections
import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from safetensors.torch import load_file
from test_pretraining import (
    assert_resumes_exactly,
    compute_in_float64,
    make_data,
    metrics,
    state_of,
    train,
)
from torch import nn

import compare
import functions
import moco
from support import devices, encoders, frozen, pretraining, settings

ARTIFACTS = (
    "config.json metrics.csv checkpoint.pt encoder.safetensors summary.json embeddings.npz "
    "predictions.npz embedding.html loss.png views.png report.html MODEL_CARD.md probe.png "
    "tsne.png confusion_matrix.png per_class_accuracy.png probe.csv probe.safetensors finetune.csv "
    "finetune.png finetune_confusion_matrix.png finetune_per_class_accuracy.png "
    "finetuned_encoder.safetensors"
)


def small_config(**changes):
    values = {"encoder": "small", "epochs": 2, "batch_size": 8, "bn_splits": 2, "queue_size": 24}
    values |= {"projection_size": 6, "knn_every": 0, "device": "cpu", "precision": "float32"}
    values["checkpoint_seconds"] = 0.0  # after every epoch
    return moco.Config(**{**values, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def fabric():
    return devices.make_fabric("cpu", "float32")


def make_model(config, seed=0):
    torch.manual_seed(seed)
    return moco.MoCo(config, 3, 8)


def pretrain(folder, config, data, fabric, seed=0, model=None):
    return train(moco, folder, model or make_model(config, seed), config, data, fabric)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------------------- loss


def papers_loss(q, k, queue, temperature):
    """Equation 1 of He et al. 2020, query by query and key by key."""

    def similarity(a, b):
        return ((a @ b) / (a.norm() * b.norm()) / temperature).exp()

    total = 0.0
    for query, key in zip(q, k, strict=True):
        positive = similarity(query, key)
        negatives = sum(similarity(query, other) for other in queue)
        total = total - (positive / (positive + negatives)).log()
    return total / len(q)


def unit(*shape, seed=0):
    return nn.functional.normalize(torch.randn(shape, generator=seeded(seed)).double(), dim=-1)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 30)])
def test_loss_and_gradient_equal_the_papers(monkeypatch, count, size):
    compute_in_float64(monkeypatch)
    q, k = torch.randn(2, count, 5, generator=seeded(count)).double()
    q.requires_grad_()
    queue, values = unit(size, 5), []
    for loss in (moco.info_nce_loss, papers_loss):
        value = loss(q, k, queue, 0.2)
        values.append((value.detach(), *torch.autograd.grad(value, q)))
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)


def test_losses_of_several_steps_equal_lightlys_with_a_memory_bank(monkeypatch):
    compute_in_float64(monkeypatch)
    model, reference = make_model(small_config()).double(), NTXentLoss(0.1, (24, 6))
    reference.memory_bank.bank = model.queue.clone()
    for step in range(5):
        q, k = torch.randn(2, 8, 6, generator=seeded(step)).double()
        q.requires_grad_()
        value, expected = moco.info_nce_loss(q, k, model.queue, 0.1), reference(q, k)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(loss, q)[0] for loss in (value, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        model.enqueue(nn.functional.normalize(k, dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_is_float32_under_autocast(dtype):
    q, k = torch.randn(2, 16, 8, generator=seeded()).to(dtype)
    queue = unit(20, 8).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = moco.info_nce_loss(q, k, queue, 0.05)
    assert value.dtype == torch.float32
    expected = papers_loss(q.double(), k.double(), queue.double(), 0.05)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------- queue, keys, BatchNorm


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (5, 7, 3, 24, 1), (50, 4)])
def test_the_queue_is_first_in_first_out(sizes):
    model = make_model(small_config())
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(24))
    expected = collections.deque(model.queue.tolist(), maxlen=24)
    for seed, size in enumerate(sizes):
        keys = torch.randn(size, 6, generator=seeded(seed))
        model.enqueue(keys)
        expected.extend(keys.tolist())
        assert model.queue.tolist() == list(expected)


def test_keys_have_no_gradient_and_are_of_the_views_in_their_order(fabric):
    config = small_config()
    model = make_model(config).eval()  # with BatchNorm as it stands the order makes no difference
    model.key_encoder.requires_grad_(True)
    views, share = torch.randn(8, 3, 8, 8, generator=seeded()), pretraining.Share(fabric, 8, 1)
    order = torch.randperm(8, generator=seeded())
    keys = moco.encode_keys(model.key_encoder, views, order, share)
    assert not keys.requires_grad
    expected = nn.functional.normalize(model.key_encoder(views), dim=1)
    torch.testing.assert_close(keys, expected.detach())
    # The parts of BatchNorm are those of the shuffled views.
    model.train()
    keys = moco.encode_keys(model.key_encoder, views, order, share)
    parts = [model.key_encoder(views[order[start : start + 4]]) for start in (0, 4)]
    expected = nn.functional.normalize(torch.cat(parts), dim=1).detach()
    torch.testing.assert_close(keys[order], expected, rtol=1e-4, atol=1e-5)


def make_norm(seed=3):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(5).double()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


@pytest.mark.parametrize("way", ["take_parts", "fold_parts"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_split_batch_norm_is_so_many_batch_norms(parts, way):
    split = moco.SplitBatchNorm(make_norm(), 12 // parts)
    split.take_parts = getattr(split, way)
    norms = [make_norm() for _ in range(parts)]
    for seed in range(3):  # the running statistics of a step are the next one's
        images = torch.randn(12, 5, 4, 4, generator=seeded(seed)).double()
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(12, 5, 4, 4, generator=seeded(9)).double()
        ours = split(images)
        expected = torch.cat([n(x) for n, x in zip(norms, images.chunk(parts), strict=True)])
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        gradients = torch.autograd.grad((ours * weight).sum(), [images, split.weight, split.bias])
        affine = [w for n in norms for w in (n.weight, n.bias)]
        whole = torch.autograd.grad((expected * weight).sum(), [images, *affine])
        expected = [whole[0], sum(whole[1::2]), sum(whole[2::2])]
        torch.testing.assert_close(list(gradients), expected, rtol=1e-9, atol=1e-12)
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(norm, name) for norm in norms]).mean(0)
            torch.testing.assert_close(getattr(split, name), mean)
    plain = nn.BatchNorm2d(5).double()
    plain.load_state_dict(split.state_dict())
    assert_same(split.eval()(images), plain.eval()(images))
    assert_same(split.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("splits", "kind"), [(1, nn.BatchNorm2d), (4, moco.SplitBatchNorm)])
def test_the_encoders_norms_are_split(splits, kind):
    model = make_model(small_config(bn_splits=splits, encoder="resnet18", width=8))
    plain = encoders.make_encoder("resnet18", "cifar", 3, 8, 8)
    assert model.encoder.state_dict().keys() == plain.state_dict().keys()
    for encoder in (model.encoder, model.key_encoder):
        both = nn.BatchNorm2d | moco.SplitBatchNorm
        norms = [layer for layer in encoder.modules() if isinstance(layer, both)]
        assert [type(norm) for norm in norms] == [kind] * 20
        assert splits == 1 or {norm.images for norm in norms} == {2}


def test_split_norms_of_timm_keep_the_activations_in_them():
    timm = pytest.importorskip("timm")
    plain = timm.create_model("efficientnet_b0", num_classes=0)
    split = copy.deepcopy(plain)
    moco.split_batch_norms(split, 2)
    assert any(isinstance(layer, moco.SplitBatchNorm) for layer in split.modules())
    assert split.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    with torch.no_grad():
        assert torch.equal(split.eval()(images), plain.eval()(images))
        expected = plain.train()(images)  # both images are one part
        torch.testing.assert_close(split.train()(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("projection", "sizes"), [("linear", [6]), ("nonlinear", [128, 6])])
def test_the_head_is_v1s_or_v2s(projection, sizes):
    model = make_model(small_config(projection=projection))
    linears = [layer for layer in model.projection_head if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linears] == sizes
    views = torch.randn(3, 4, 3, 8, 8, generator=seeded())
    h = model.encoder(views[0])
    z = linears[-1](linears[0](h).clamp(min=0) if projection == "nonlinear" else h)
    torch.testing.assert_close(model(views[0]), z, rtol=1e-4, atol=1e-5)
    each = torch.cat([model(part) for part in views])
    torch.testing.assert_close(model(*views), each, rtol=1e-4, atol=1e-5)  # one by one


# --------------------------------------------------------------------------------- training


def in_parts(encoder, head, x, size):
    return torch.cat([head(encoder(part)) for part in x.split(size)])


@pytest.mark.parametrize(
    ("symmetric", "splits", "queue"), [(False, 2, 24), (True, 4, 16), (False, 1, 30)]
)
def test_training_equals_algorithm_1(tmp_path, monkeypatch, fabric, symmetric, splits, queue):
    compute_in_float64(monkeypatch)
    changes = {"symmetric": symmetric, "queue_size": queue, "temperature": 0.3, "seed": 7}
    changes |= {"learning_rate": 0.5, "weight_decay": 0.05, "epochs": 3, "warmup_epochs": 1}
    config = small_config(bn_splits=splits, key_momentum=0.6, **changes)
    mean, std = torch.tensor([0.2, 0.5, 0.6]).double(), torch.tensor([0.3, 0.4, 0.2]).double()
    data = make_data()
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, mean=mean, std=std))
    model = make_model(config).double()
    plain = make_model(dataclasses.replace(config, bn_splits=1)).double()
    model.queue.copy_(unit(queue, 6))  # of length 1 in float64, too
    with torch.no_grad():
        for weight in (*model.encoder.parameters(), *plain.encoder.parameters()):
            weight.add_(0.01)  # as --weights would
    history, _ = pretrain(tmp_path, config, data, fabric, model=model)

    query = (plain.encoder, plain.projection_head)
    key = copy.deepcopy(query)
    weights, followers = ([w for m in modules for w in m.parameters()] for modules in (query, key))
    speeds = [torch.zeros_like(weight) for weight in weights]
    kept, losses, peak, size = list(unit(queue, 6)), [], 0.5 * 8 / 256, 8 // splits

    def make_view(images, generator):
        view = pretraining.crop_views(images, config, generator)
        return (view - mean[:, None, None]) / std[:, None, None]

    def make_keys(view, shuffling):
        shuffled = torch.randperm(8, generator=shuffling)
        k = torch.empty(8, 6).double()
        k[shuffled] = in_parts(*key, view[shuffled], size).detach()
        return list(k / k.norm(dim=1, keepdim=True))

    first = devices.epoch_generator(7, 0, stream=5)
    for step in range(math.ceil(queue / 8)):
        if step % 3 == 0:  # three batches from each of the epochs after the last
            order = torch.randperm(28, generator=devices.epoch_generator(7, 3 + step // 3))
            drawn = devices.epoch_generator(7, 3 + step // 3, stream=1)
        index = order[:24].split(8)[step % 3]
        kept = (kept + make_keys(make_view(data.train.images[index], drawn), first))[8:]
    for epoch in range(3):
        order = torch.randperm(28, generator=devices.epoch_generator(7, epoch))
        generator = devices.epoch_generator(7, epoch, stream=1)
        shuffling = devices.epoch_generator(7, epoch, stream=5) if epoch else first
        for step in range(3):
            images = data.train.images[order[8 * step : 8 * step + 8]]
            x1, x2 = (make_view(images, generator) for _ in range(2))
            pairs = [(x1, x2), (x2, x1)] if symmetric else [(x1, x2)]
            loss, new, recorded = 0.0, [], None
            for x_query, x_key in pairs:
                k = make_keys(x_key, shuffling)
                q = in_parts(*query, x_query, size)
                recorded = recorded if new else q.detach()  # of the first views
                loss = loss + papers_loss(q, torch.stack(k), kept, 0.3) / len(pairs)
                new += k
            for weight in weights:
                weight.grad = None
            loss.backward()
            done = (3 * epoch + step - 3) / 6  # of what follows the warm-up
            height = (step + 1) / 3 if epoch == 0 else (1 + math.cos(math.pi * done)) / 2
            for weight, speed, follower in zip(weights, speeds, followers, strict=True):
                speed.mul_(0.9).add_(weight.grad + 0.05 * weight.detach())
                weight.data -= peak * height * speed
                follower.data = 0.6 * follower.data + 0.4 * weight.data
            kept = (kept + new)[len(new) :]
            losses.append(loss.item())
    means = np.reshape(losses, (3, 3)).mean(1).tolist()
    assert [row["loss"] for row in history] == pytest.approx(means, rel=1e-6)  # kept in float32
    assert history[0]["loss"] != pytest.approx(history[-1]["loss"], rel=0.01)
    spread = functions.embedding_std(recorded)
    assert history[-1]["embedding_std"] == pytest.approx(spread, rel=1e-6)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(model.query_parameters(), weights, **close)
    torch.testing.assert_close(list(model.key_encoder.parameters()), followers, **close)
    torch.testing.assert_close(model.queue, torch.stack(kept), rtol=1e-6, atol=1e-6)  # float32
    assert all(weight.grad is None for weight in model.key_encoder.parameters())


def test_a_queue_of_more_keys_than_images_is_announced(tmp_path, capsys, fabric):
    for size, said in ((24, 0), (32, 1)):
        pretrain(tmp_path / str(size), small_config(queue_size=size, epochs=1), make_data(), fabric)
        assert capsys.readouterr().out.count("more than the 28 images") == said


def test_a_stopped_run_repeats_an_uninterrupted_one(tmp_path, monkeypatch, fabric):
    state = assert_resumes_exactly(pretrain, tmp_path, monkeypatch, small_config(epochs=4), fabric)
    assert {"queue", "key_encoder.1.0.weight"} <= state["model"].keys()


def test_the_compiled_model_equals_the_eager_one():
    eager, views = make_model(small_config()), torch.randn(2, 8, 3, 8, 8, generator=seeded())
    model, found = copy.deepcopy(eager), []
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}  # or an error
    parts = [eager, eager.key_encoder]
    parts += [torch.compile(part, **options) for part in (model, model.key_encoder)]
    for one, queries, key_encoder in ((eager, *parts[:2]), (model, *parts[2:])):
        z = queries(*views)
        z.square().sum().backward()
        with torch.no_grad():
            keys = key_encoder(views[0])
        gradients = [weight.grad for weight in one.query_parameters()]
        found.append([z.detach(), keys, *gradients, *one.state_dict().values()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with all stages."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")

    def project(features, method, seed):
        return np.arange(2.0 * len(features)).reshape(-1, 2)

    values = {"dataset": "digits", "epochs": 3, "batch_size": 128, "probe_epochs": 20}
    values |= {"bn_splits": 8, "queue_size": 512, "projection_size": 64, "finetune_epochs": 2}
    values |= {"stages": "pretrain,probe,embed,finetune", "precision": "auto"}
    config = small_config(**values, output_dir=str(folder), name="run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "project_2d", project)
        moco.main(config)
    return folder / "moco" / "run"


def test_a_run_makes_every_artifact_and_learns(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted(ARTIFACTS.split())
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["linear_probe_accuracy"] > 0.8  # chance 0.1
    assert summary["finetune_accuracy"] > 0.3
    assert len(metrics(finished)) == 3
    (run,) = compare.read_run(finished)
    assert (run.script, run.summary["knn_accuracy"]) == ("moco", summary["knn_accuracy"])


def test_the_encoders_file_is_the_query_encoder(finished):
    state, weights = state_of(finished)["model"], load_file(finished / "encoder.safetensors")
    for name, value in weights.items():
        assert torch.equal(value, state[f"encoder.{name}"])
    assert not torch.equal(weights["0.weight"], state["key_encoder.0.0.weight"])
    encoder = frozen.load_encoder(finished, "cpu")
    test = functions.load_images("digits").with_statistics().test
    features = functions.extract_features(encoder.network, test, encoder.fabric)
    assert np.array_equal(features.numpy(), np.load(finished / "embeddings.npz")["features"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--temperature 0", "--temperature must be in [0.0001, 10000], not 0"),
        ("--key-momentum 1", "--key-momentum must be in [0, 1), not 1"),
        ("--queue-size 0", "--queue-size must be at least 1"),
        ("--bn-splits 0", "--bn-splits must be at least 1"),
        ("--bn-splits 7", "--batch-size 512 does not divide into --bn-splits 7 parts"),
        ("--bn-splits 16 --batch-size 16", "--batch-size 16 does not divide into --bn-splits 16"),
        ("--devices 2 --bn-splits 3 --batch-size 12", "--bn-splits 3 does not divide among 2"),
        ("--stages pretrain,study", "--stages knows pretrain,probe,embed,finetune"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    tmp_path, monkeypatch, user_error, line, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(functions, "load_images", None)  # they show before anything is loaded
    with user_error(words):
        moco.main(settings.parse_config(moco.Config, ["--dataset", "digits", *line.split()], ""))
    assert list(tmp_path.iterdir()) == []
