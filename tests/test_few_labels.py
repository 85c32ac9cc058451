import copy
import csv
import dataclasses
import functools
import json
import multiprocessing
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import unrendered
from PIL import Image
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize
from test_pretraining import compute_in_float64

import classifiers
import few_labels
import functions
import simsiam
from support import (
    augment,
    checkpoints,
    datasets,
    devices,
    encoders,
    errors,
    files,
    frozen,
    graphs,
    neighbours,
    pool,
    report,
    scores,
    settings,
)
from support.errors import UserError


def labels_of(*counts):
    """Shuffled labels with so many of each class."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


# --------------------------------------------------------------------------- labelled images


@pytest.mark.parametrize("count", [1, 7, 30, 59, 60])
def test_balanced_draws_are_nested_and_without_repeats(count):
    labels = labels_of(20, 20, 20)
    for seed in range(5):
        chosen = datasets.draw_labels(labels, count, seed)
        counts = labels[chosen].bincount(minlength=3)
        assert len(chosen.unique()) == len(chosen) == count
        assert counts.max() - counts.min() <= 1
        for more in range(count, 61, 9):
            assert torch.equal(datasets.draw_labels(labels, more, seed)[:count], chosen)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [((2, 50, 50), 60, [2, 29, 29]), ((2, 50, 9), 61, [2, 50, 9]), ((1, 1, 40), 12, [1, 1, 10])],
)
def test_small_classes_give_all_they_have(sizes, count, expected):
    labels = labels_of(*sizes)
    chosen = datasets.draw_labels(labels, count, 3)
    assert len(chosen.unique()) == count
    assert labels[chosen].bincount(minlength=3).tolist() == expected


@pytest.mark.parametrize("draws", ["balanced", "random"])
def test_each_image_of_equal_classes_is_drawn_as_often_as_any_other(draws):
    labels = labels_of(6, 6, 6)
    drawn = [datasets.draw_labels(labels, 5, (0, seed), draws) for seed in range(600)]
    assert torch.equal(drawn[0], datasets.draw_labels(labels, 5, (0, 0), draws))
    counts = torch.cat(drawn).bincount(minlength=18)  # 600 * 5 / 18 = 167, sd below 12.3
    assert (counts - 600 * 5 / 18).abs().max() < 4 * 12.3


def test_random_draws_are_nested_and_as_unbalanced_as_the_data():
    labels = labels_of(10, 90)
    small = [datasets.draw_labels(labels, 20, seed, "random") for seed in range(300)]
    for seed, chosen in enumerate(small[:5]):
        assert len(chosen.unique()) == 20
        assert torch.equal(datasets.draw_labels(labels, 50, seed, "random")[:20], chosen)
    rare = torch.tensor([(labels[chosen] == 0).sum() for chosen in small]).float()
    assert abs(rare.mean() - 2) < 0.3  # sd of the mean: 0.07
    assert rare.std() > 0.8


# ----------------------------------------------------------------------------- label spreading


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_graph(count=40, k=5):
    points = F.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(2)), dim=1)
    similarity, index = neighbours.find_nearest(points, points, k)
    return similarity.numpy(), index.numpy()


def dense_affinity(similarity, index):
    w = np.zeros((len(index), len(index)))
    for i, (values, others) in enumerate(zip(similarity, index, strict=True)):
        for value, j in zip(values, others, strict=True):
            w[i, j] += max(float(value), 0) ** 3
            w[j, i] += max(float(value), 0) ** 3
    return w


def test_spreading_is_the_closed_form_of_the_paper():
    similarity, index = small_graph()
    w = dense_affinity(similarity, index)
    d = np.diag(w.sum(1) ** -0.5)
    s = d @ w @ d
    graph = graphs.normalized_graph(similarity, index)
    np.testing.assert_allclose(graph.toarray(), s, atol=1e-12)
    chosen, classes = np.array([3, 8, 20, 31]), np.array([0, 1, 1, 2])
    y = np.zeros((40, 3))
    y[chosen, classes] = 1
    f = np.linalg.inv(np.eye(40) - 0.9 * s) @ y  # equation 4
    f *= np.array([1, 2, 1]) / f.sum(0)  # as much for each class as its labels are
    found = graphs.spread(graph, chosen, np.eye(3)[classes], 0.9)
    np.testing.assert_allclose(found, f, rtol=1e-4, atol=1e-6)


def test_features_that_are_all_alike_end_soon():
    dead = (torch.zeros(30, 4), torch.zeros(5, 4))
    found = {k: v.numpy() for k, v in graphs.find_neighbourhood([dead], 3, False).items()}
    graph = graphs.normalized_graph(found["near"], found["where"])
    assert np.isfinite(graphs.spread(graph, np.array([0, 1]), np.eye(2), 0.99)).all()


def test_new_images_take_their_neighbours_scores():
    scores_of = np.array([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
    found = graphs.average_neighbours(
        scores_of, np.array([[0.5, 0.25], [0.5, -1.0]]), np.array([[0, 1], [2, 1]])
    )
    np.testing.assert_allclose(found, [[1 / 8, 3 / 64], [2 / 8, 2 / 8]])


def test_whitening_makes_all_kept_directions_equal():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(500, 6, generator=generator) * torch.tensor([6.0, 5, 4, 3, 2, 1])
    train = train - train.mean(0)
    u, _, _ = torch.linalg.svd(train, full_matrices=False)
    bank, queries = graphs.whiten(train, train[:9])
    expected = F.normalize(u, dim=1)
    torch.testing.assert_close(bank @ bank.T, expected @ expected.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(queries, bank[:9])


def test_whitening_raises_nothing_above_a_twentieth_of_the_largest():
    u = torch.linalg.qr(torch.randn(200, 3, generator=seeded()))[0]
    train = u * torch.tensor([100.0, 50.0, 1.0])
    bank, _ = graphs.whiten(train, train[:1])
    expected = F.normalize(u * torch.tensor([1.0, 1.0, 1 / 5]), dim=1)  # a fifth of a twentieth
    torch.testing.assert_close(bank @ bank.T, expected @ expected.T, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------- the methods


def given(features=None, test=None, labels=None, **changes):
    """What a method on features gets; the first images are labelled."""
    held = None if features is None else {"known": features[: len(labels)], "test": test}
    values = {"images": None, "test": None, "chosen": torch.arange(len(labels))}
    values |= {"labels": labels, "classes": int(labels.max()) + 1, "encoder": None}
    values |= {
        "features": held,
        "near": None,
        "seed": 0,
        "config": few_labels.Config(),
        "fabric": None,
    }
    return classifiers.Given(**(values | changes))


def test_neighbours_with_pixels_are_by_the_mean_of_both_cosines():
    draw = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(60, d, generator=draw), torch.randn(7, d, generator=draw)) for d in (3, 4)
    ]
    white = [graphs.whiten(*part) for part in parts]
    own, new = (sum(part[i] @ part[0].T for part in white) / 2 for i in (0, 1))
    own.fill_diagonal_(-2)
    found = graphs.find_neighbourhood(parts, 5, transductive=False)
    torch.testing.assert_close(found["near"], own.topk(5).values)
    torch.testing.assert_close(found["test_near"], new.topk(5).values)
    assert torch.equal(found["where"], own.topk(5).indices)
    found = graphs.find_neighbourhood(parts, 5, transductive=True)
    assert found["where"].shape == (67, 5)
    assert found["where"].max() > 60
    assert "test_near" not in found


def test_the_nearest_mean_is_scikit_learns():
    draw = torch.Generator().manual_seed(0)
    features, test = torch.randn(50, 5, generator=draw), torch.randn(200, 5, generator=draw)
    labels = torch.tensor([0, 3, 3, 1, 0, 1, 1])  # nobody has drawn class 2
    known, new = normalize(features[:7].numpy()), normalize(test.numpy())
    expected = NearestCentroid().fit(known, labels.numpy()).predict(new)
    found = classifiers.nearest_mean(given(features, test, labels))
    assert found.tolist() == expected.tolist()


def test_logistic_regression_is_scikit_learns_with_the_penalty_that_is_asked_for():
    features, test = (
        torch.randn(30, 5, generator=seeded()),
        torch.randn(200, 5, generator=seeded(1)),
    )
    labels = torch.arange(30) % 3 * 2  # 0, 2 and 4
    config = few_labels.Config(penalty=20.0)
    found = classifiers.logistic_regression(given(features, test, labels, config=config))
    known, new = (5**0.5 * normalize(part.numpy()) for part in (features, test))
    expected, other = (
        LogisticRegression(C=c).fit(known, labels.numpy()).predict(new) for c in (1 / 20, 1)
    )
    assert found.tolist() == expected.tolist() != other.tolist()


def test_logistic_regression_of_a_single_class_says_it():
    found = classifiers.logistic_regression(
        given(torch.randn(9, 3), torch.randn(4, 3), torch.tensor([2, 2]))
    )
    assert found.tolist() == [2] * 4


def test_the_loss_of_fixmatch_is_that_of_a_naive_loop():
    draw = torch.Generator().manual_seed(0)
    logits, weak, strong = (3 * torch.randn(n, 4, generator=draw) for n in (6, 30, 30))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    weak.requires_grad_()
    expected = sum(-logits[i].log_softmax(0)[labels[i]] for i in range(6)) / 6
    counted = 0
    for i in range(30):  # equation 4
        q = weak[i].softmax(0)
        if q.max() >= 0.8:
            expected = expected - strong[i].log_softmax(0)[q.argmax()].detach() / 30
            counted += 1
    assert 5 < counted < 25
    loss = classifiers.fixmatch_loss(logits, labels, weak, strong, 0.8)
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad  # no gradient reaches the guesses


def test_the_weak_view_is_a_flip_and_a_shift_of_an_eighth():
    image = torch.arange(1, 257).clamp(max=255).byte().view(1, 1, 16, 16)
    config = few_labels.Config()
    still = dataclasses.replace(config, flip_probability=0.0)
    views = classifiers.augment_weakly(image.expand(800, -1, -1, -1), still, seeded())
    assert len(views.flatten(1).unique(dim=0)) == 25
    views = classifiers.augment_weakly(image.expand(800, -1, -1, -1), config, seeded())
    places = {}
    for turned in (image, image.flip(3)):
        wide = F.pad(turned[0, 0], (2, 2, 2, 2))
        for y in range(5):
            for x in range(5):
                places[wide[y : y + 16, x : x + 16].flatten().numpy().tobytes()] = 0
    for view in views:
        places[view.flatten().numpy().tobytes()] += 1  # no other key
    counts = np.array(list(places.values()))  # 800 / 50 = 16 each, sd 4
    assert len(counts) == 50
    assert 1 <= counts.min() <= counts.max() < 40


def test_the_strong_view_has_two_ops_of_a_random_strength_and_half_the_side_cut_out(monkeypatch):
    magnitudes, sides = set(), set()

    def rand_augment(images, ops, negative, magnitude):
        assert ops.shape == negative.shape == (2, 2)
        magnitudes.add(magnitude)
        return images

    cutout = augment.random_cutout
    monkeypatch.setattr(classifiers, "augment_weakly", lambda images, *_: images)
    monkeypatch.setattr(classifiers.randaugment, "rand_augment", rand_augment)
    monkeypatch.setattr(
        augment, "random_cutout", lambda i, side, g: sides.add(side) or cutout(i, side, g)
    )
    host, images = seeded(), torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    for _ in range(200):
        classifiers.augment_strongly(images, few_labels.Config(), host, host)
    assert magnitudes == set(range(3, 28))  # of 30: from 0.1 to 0.9
    assert sides == {8}


def digits_given(count, **changes):
    """What a method on images gets: the first of the digits are labelled."""
    data = functions.load_images("digits")
    torch.manual_seed(0)
    encoder = encoders.make_encoder("small", "cifar", 1, 8)
    order = torch.randperm(len(data.train), generator=seeded(1))
    chosen = order[:count]
    images, test = (dataclasses.replace(part, labels=None) for part in (data.train, data.test))
    values = {"images": images, "test": test, "chosen": chosen, "classes": 10, "encoder": encoder}
    values |= {"fabric": devices.make_fabric("cpu", "float32"), "seed": 5}
    about = given(labels=data.train.labels[chosen])
    return dataclasses.replace(about, **(values | changes))


def test_fixmatch_is_algorithm_1(monkeypatch):
    compute_in_float64(monkeypatch)
    config = few_labels.Config(
        steps=3, unlabelled_ratio=2, threshold=0.2, fixmatch_rate=0.1, device="cpu"
    )
    mine = digits_given(30, config=config)
    mine.encoder.double()
    encoder = copy.deepcopy(mine.encoder)
    torch.manual_seed(4)
    layer = torch.nn.Linear(128, 10).double()
    monkeypatch.setattr(classifiers.nn, "Linear", lambda *_: copy.deepcopy(layer))
    found = classifiers.fixmatch(mine)

    network = torch.nn.Sequential(encoder, layer).train()
    weights = list(network.parameters())
    speeds = [torch.zeros_like(weight) for weight in weights]
    everyone, sure = mine.images.images, []
    for step in range(3):
        draw, host = (devices.epoch_generator(5, step, stream=stream) for stream in (5, 6))
        known = torch.randint(30, (64,), generator=draw)
        others = torch.randint(len(everyone), (128,), generator=draw)
        x = classifiers.augment_weakly(everyone[mine.chosen[known]], config, draw)
        weak = classifiers.augment_weakly(everyone[others], config, draw)
        strong = classifiers.augment_strongly(everyone[others], config, draw, host)
        batch = torch.cat([x / 255, weak / 255, strong])
        z = network((batch - mine.images.mean) / mine.images.std)  # one pass of all (section 2.2)
        q = z[64:192].detach().softmax(1)
        mask = (q.max(1).values >= 0.2).float()
        sure.append(mask.mean().item())
        loss = F.cross_entropy(z[:64], mine.labels[known])
        loss = loss + (mask * F.cross_entropy(z[192:], q.argmax(1), reduction="none")).mean()
        rate = 0.1 * (1 + np.cos(np.pi * step / 3)) / 2
        for weight, speed, gradient in zip(
            weights, speeds, torch.autograd.grad(loss, weights), strict=True
        ):
            gradient = gradient + 5e-4 * weight.detach()
            speed.mul_(0.9).add_(gradient)
            weight.data -= rate * (gradient + 0.9 * speed)  # Nesterov's
    assert min(sure) < 0.9
    assert max(sure) > 0.1
    torch.testing.assert_close(
        mine.encoder.state_dict(), encoder.state_dict(), rtol=1e-8, atol=1e-8
    )
    with torch.no_grad():
        z = network.eval()((mine.test.images / 255 - mine.test.mean) / mine.test.std)
    assert (found == z.argmax(1)).float().mean() > 0.99


@pytest.mark.parametrize(
    ("method", "count", "epochs", "rate", "decay"),
    [
        *[("scratch", 30, 7, 1e-3, 0), ("tuned", 30, 7, 1e-3, 0.01), ("tuned", 600, 4, 1e-3, 0.01)],
        *[("finetune", 30, 7, 2e-4, 0.01), ("mlp", 30, 7, 1e-3, 0.01)],
    ],
)
def test_each_training_has_its_settings(monkeypatch, method, count, epochs, rate, decay):
    config = few_labels.Config(steps=7, finetune_rate=2e-4, crop_scale_min=0.5)
    mine = digits_given(count, config=config)
    if method == "mlp":
        test, known = torch.randn(40, 6, generator=seeded()), torch.randn(count, 6)
        mine = dataclasses.replace(mine, features={"known": known, "test": test})
    calls = []

    def train_classifier(classifier, optimizer, inputs, labels, prepare, *rest):
        calls.append((classifier, inputs, prepare))
        assert type(optimizer) is torch.optim.AdamW
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (rate, decay)
        assert len(group["params"]) == len(list(classifier.parameters()))
        assert all(weight.requires_grad for weight in classifier.parameters())
        assert torch.equal(labels, mine.labels)
        assert rest == (epochs, 5, mine.fabric)
        classifier.train()
        for layer in classifier.modules():
            if hasattr(layer, "running_mean"):
                torch.nn.init.uniform_(layer.running_mean)
        return iter(())

    monkeypatch.setattr(classifiers.supervised, "train_classifier", train_classifier)
    found = classifiers.METHODS[method].predict(mine)
    ((classifier, inputs, prepare),) = calls
    classifier.eval()
    if method == "mlp":
        assert torch.equal(inputs, mine.features["known"])
        assert prepare(inputs, seeded()) is inputs
        assert torch.equal(found, classifier(test).argmax(1))
        return
    assert torch.equal(inputs, mine.images.images[mine.chosen])
    views = batch = inputs / 255
    if method != "scratch":
        views = augment.random_resized_crop(batch, (0.5, 1.0), 0.5, seeded(2))
    mean, std = mine.images.mean, mine.images.std
    torch.testing.assert_close(prepare(inputs, seeded(2)), (views - mean) / std)
    with torch.no_grad():
        z = classifier((mine.test.images / 255 - mean) / std)
    assert (found == z.argmax(1)).float().mean() > 0.99


def test_spreading_among_all_images_ends_with_the_test_images():
    near = graphs.Neighbourhood(small_graph(), None)
    chosen, labels = torch.tensor([3, 8, 20]), torch.tensor([0, 1, 2])
    mine = given(labels=labels, chosen=chosen, near=near, config=few_labels.Config(alpha=0.5))
    test = datasets.Split(torch.zeros(12, 1, 8, 8), None)
    found = classifiers.spread_labels(dataclasses.replace(mine, test=test))
    everyone = graphs.spread(near.graph, chosen.numpy(), np.eye(3), 0.5)
    other = graphs.spread(near.graph, chosen.numpy(), np.eye(3), few_labels.Config().alpha)
    assert found.tolist() != other[28:].argmax(1).tolist()
    assert len(set(found.tolist())) > 1
    assert found.tolist() == everyone[28:].argmax(1).tolist()


# ------------------------------------------------------------------------------ a comparison


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Two runs that differ in their seed, and one with another batch size."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pretrained")
    for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"batch_size": 128}}.items():
        values = {"dataset": "digits", "epochs": 1, "batch_size": 256, "knn_every": 0}
        values |= {"stages": "pretrain", "name": name, "output_dir": str(folder), "device": "cpu"}
        with unrendered():
            simsiam.main(simsiam.Config(**(values | changes)))
    return {name: str(folder / "simsiam" / name) for name in "abc"}


def make_config(folder, **changes):
    values = {"labels": "20", "quick_draws": 3, "slow_draws": 2, "steps": 3, "device": "cpu"}
    values |= {"unlabelled_ratio": 1, "output_dir": str(folder), "name": "run"}
    return few_labels.Config(**(values | {"precision": "float32"} | changes))


@pytest.fixture(scope="module")
def finished(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(folder, runs=tuple(pretrained.values()))
    return config, few_labels.main(config), folder / "few_labels" / "run"


def read(folder, name="few_labels"):
    return list(csv.DictReader((folder / f"{name}.csv").open()))


def results(folder):
    return {scores.task_of(row): (row["accuracy"], row["macro_f1"]) for row in read(folder)}


def test_every_method_has_a_row_for_each_draw(finished):
    _, summary, folder = finished
    names = {
        "nothing": ["scratch", "tuned", "fixmatch"],
        "pixels": ["mean", "linear", "spreading"],
        **{
            f"simsiam/{n}": [
                "fixmatch-finetune",
                *["mean", "linear", "mlp", "spreading", "fused", "finetune"],
            ]
            for n in "abc"
        },
    }
    slow = {"scratch", "tuned", "fixmatch", "finetune", "fixmatch-finetune"}
    wanted = {
        (method, start, "20", str(draw))
        for start, methods in names.items()
        for method in methods
        for draw in range(2 if method in slow else 3)
    }
    assert set(results(folder)) == wanted
    made = "config.json few_labels.csv scores.csv differences.csv table.md few_labels.png"
    assert {path.name for path in folder.iterdir()} == {
        *made.split(),
        "summary.json",
        "report.html",
    }
    assert summary == json.loads((folder / "summary.json").read_text())
    assert json.loads((folder / "config.json").read_text())["dataset"] == "digits"
    with Image.open(folder / "few_labels.png") as image:
        assert image.width == 960


def test_runs_that_differ_in_their_seed_are_one_line(finished):
    rows = read(finished[2], "scores")
    (line,) = [
        r for r in rows if r["name"] == "nearest mean, 2 runs of simsiam" and r["labels"] == "20"
    ]
    mine = [
        float(r["accuracy"])
        for r in read(finished[2])
        if r["start"] in ("simsiam/a", "simsiam/b") and (r["method"], r["labels"]) == ("mean", "20")
    ]
    assert (line["runs"], line["trainings"]) == ("2", "6")
    assert float(line["accuracy"]) == pytest.approx(np.mean(mine))
    assert float(line["accuracy_sd"]) == pytest.approx(np.std(mine, ddof=1))
    assert "nearest mean, simsiam/c" in {row["name"] for row in rows}
    assert not any("simsiam/b" in row["name"] for row in rows)


def test_differences_and_the_summary_are_of_the_trainings(finished):
    _, summary, folder = finished
    trainings = read(folder)

    def accuracies(method, *starts):
        found = [r for r in trainings if r["method"] == method and r["start"] in starts]
        return np.array([float(row["accuracy"]) for row in found]).reshape(-1, len(starts))

    both = accuracies("mean", "simsiam/a", "simsiam/b")  # (draws, runs)
    name = "nearest mean, 2 runs of simsiam"
    assert summary[f"accuracy of {name}"] == {"20": pytest.approx(both.mean())}
    plain = [("scratch", "nothing"), ("tuned", "nothing"), ("fixmatch", "nothing")]
    plain += [(method, "pixels") for method in ("mean", "linear", "spreading")]
    rivals = {classifiers.METHODS[m].label: accuracies(m, start)[:, 0] for m, start in plain}
    (row,) = [row for row in read(folder, "differences") if row["name"] == name]
    rival = rivals[row["opponent"].removesuffix(", pixels")]
    assert rival[:2].mean() == max(values[:2].mean() for values in rivals.values())
    gap = (both.mean(1)[: len(rival)] - rival).mean()
    assert float(row["difference"]) == pytest.approx(gap)
    assert not any(row["name"].endswith(", pixels") for row in read(folder, "differences"))


def test_a_diverging_training_is_named(tmp_path):
    config = make_config(tmp_path, dataset="digits", methods="fixmatch", fixmatch_rate=1e6)
    config = dataclasses.replace(config, steps=20)
    with pytest.raises(errors.Diverged, match="fixmatch from nothing, 20 labels, draw 1: the loss"):
        few_labels.main(config)


def test_labels_that_there_are_not_are_told(tmp_path, capsys):
    config = make_config(tmp_path, dataset="digits", methods="mean", labels="20,5000,all")
    few_labels.main(config)
    assert "--labels above 1,437 are left out" in capsys.readouterr().out
    assert {row["labels"] for row in read(tmp_path / "few_labels" / "run")} == {"20", "1437"}


def test_classes_without_test_images_have_no_score(tmp_path, monkeypatch):
    digits = functions.load_images("digits")
    some = digits.test.select((digits.test.labels < 9).nonzero()[:, 0])
    monkeypatch.setattr(few_labels, "load_data", lambda _: dataclasses.replace(digits, test=some))
    answers = some.labels.clone()
    answers[(some.labels == 3).nonzero()[0]] = 9  # which nobody asked for
    method = classifiers.METHODS["scratch"]._replace(predict=lambda _: answers)
    monkeypatch.setitem(classifiers.METHODS, "scratch", method)
    config = make_config(tmp_path, dataset="digits")
    row = few_labels.Trainer(config, tmp_path)(scores.Task("scratch", "nothing", 20, 0))
    threes = int((some.labels == 3).sum())
    recall = (threes - 1) / threes
    assert row["macro_f1"] == pytest.approx((8 + 2 * recall / (1 + recall)) / 9)


def test_runs_that_were_evaluated_in_other_ways_are_one_group(pretrained, tmp_path):
    other = Path(shutil.copytree(pretrained["b"], tmp_path / "b"))
    record = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(record | {"probe_epochs": 7}))
    starts = few_labels.read_starts([pretrained["a"], str(other), pretrained["c"]])
    groups = {name: start.group for name, start in starts.items() if start.folder}
    both, alone = "2 runs of simsiam", "simsiam/c"
    assert groups == {"simsiam/a": both, "simsiam/b": both, "simsiam/c": alone}
    (other / "config.json").write_text(json.dumps(record | {"batch_size": 128}))
    other.rename(tmp_path / "d")  # which differs from c in its seed
    starts = few_labels.read_starts([*pretrained.values(), str(tmp_path / "d")])
    groups = [start.group for start in starts.values() if start.folder]
    assert groups == ["simsiam/a and 1 more"] * 2 + ["simsiam/c and 1 more"] * 2


@pytest.mark.usefixtures("unrendered_pictures")
def test_a_comparison_that_was_stopped_does_what_is_missing(finished, tmp_path, monkeypatch):
    config, _, folder = finished
    config = dataclasses.replace(config, output_dir=str(tmp_path), methods="scratch,linear,mlp")
    call, calls = few_labels.Trainer.__call__, []

    def stopping(self, task):
        calls.append(task)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return call(self, task)

    monkeypatch.setattr(few_labels.Trainer, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        few_labels.main(config)
    again = tmp_path / "few_labels" / "run"
    assert len(read(again)) == 5
    few_labels.main(dataclasses.replace(config, resume=str(again)))
    everything = results(folder)
    mine = {task: row for task, row in everything.items() if task.method in "scratch linear mlp"}
    assert results(again) == mine
    assert len(calls) == len(mine) + 1
    few_labels.main(dataclasses.replace(config, resume=str(again), quick_draws=2))  # nothing to do
    assert len(calls) == len(mine) + 1
    assert results(again) == mine  # rows that were not asked for are kept


def test_two_workers_make_the_rows_of_one(finished, tmp_path):
    config, _, folder = finished
    values = {"output_dir": str(tmp_path), "methods": "scratch,mean,mlp", "workers": 2}
    few_labels.main(dataclasses.replace(config, **values))
    mine = results(tmp_path / "few_labels" / "run")
    assert len(mine) == 2 + 4 * 3 + 3 * 3
    everything = results(folder)
    assert mine == {task: everything[task] for task in mine}


def fail(task):
    raise UserError(f"task {task} cannot be done")


def make_failing():
    return fail


def test_a_new_encoder_is_like_that_of_the_runs(tmp_path):
    network = encoders.make_encoder("resnet18", "imagenet", 1, 8, 4)
    about = {"encoder": "resnet18", "stem": "imagenet", "width": 4}
    path = tmp_path / "encoder.safetensors"
    checkpoints.save_weights(path, network, {"about": json.dumps(about)})
    trainer = SimpleNamespace(
        config=few_labels.Config(runs=(str(tmp_path),)), data=functions.load_images("digits")
    )
    made = few_labels.Trainer.make_encoder(trainer, None).state_dict()
    assert {name: weights.shape for name, weights in made.items()} == {
        name: weights.shape for name, weights in network.state_dict().items()
    }


def test_a_mistake_in_a_worker_is_told(user_error):
    with user_error("cannot be done"):
        list(pool.run_tasks(make_failing, [1], 2))


def make_mask():
    return lambda task: signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows cannot block signals")
def test_workers_do_not_hear_ctrl_c_from_their_first_instruction_on():
    assert list(pool.run_tasks(make_mask, [1], 2)) == [True]
    assert not make_mask()(1)


def test_workers_end_and_other_processes_do_not(monkeypatch):
    class Threads(ThreadPoolExecutor):
        def __init__(self, workers, *_):
            super().__init__(workers)

    monkeypatch.setattr(pool.futures, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(pool, "_work", None)
    sleeper = functools.partial(multiprocessing.get_context("fork").Process, target=time.sleep)
    other, worker = sleeper(args=(60,)), sleeper(args=(60,))
    other.start()
    try:
        for result in pool.run_tasks(lambda: str, [1], 2):
            assert result == "1"
            worker.start()
        worker.join(20)
        assert worker.exitcode == -signal.SIGKILL
        assert other.is_alive()
    finally:
        other.kill()


@pytest.mark.parametrize("transductive", [False, True])
def test_no_other_label_changes_a_prediction(pretrained, tmp_path, monkeypatch, transductive):
    """A training sees the labels that were drawn: neither other images' nor test images'."""
    config = make_config(tmp_path, runs=(pretrained["a"],), dataset="digits", labels="20")
    config = dataclasses.replace(config, transductive=transductive)
    starts, data = few_labels.read_starts(config.runs), few_labels.load_data(config)
    tasks = [t for t in few_labels.list_tasks(config, starts, len(data.train)) if t.draw == 0]
    assert {task.method for task in tasks} == set(classifiers.METHODS)
    finished = frozen.load_encoder(Path(pretrained["a"]), "cpu").network.state_dict()
    weights = {}

    def spy(method, mine):
        if mine.encoder is not None:
            weights[method] = copy.deepcopy(mine.encoder.state_dict())
        return methods[method].predict(mine)

    methods = dict(classifiers.METHODS)
    for name, method in methods.items():
        spied = method._replace(predict=functools.partial(spy, name))
        monkeypatch.setitem(classifiers.METHODS, name, spied)
    chosen = datasets.draw_labels(data.train.labels, 20, (0, 0))
    hidden = (data.train.labels + 1) % 10
    hidden[chosen] = data.train.labels[chosen]
    changed = dataclasses.replace(
        data,
        train=dataclasses.replace(data.train, labels=hidden),
        test=dataclasses.replace(data.test, labels=data.test.labels.flip(0)),
    )
    found = []
    for version in (data, changed):
        monkeypatch.setattr(few_labels, "load_data", lambda _, version=version: version)
        monkeypatch.setattr(datasets, "draw_labels", lambda *_: chosen)
        folder = tmp_path / str(len(found))
        few_labels.prepare(folder, tasks, starts, config, version)
        trainer, predictions = few_labels.Trainer(config, folder), []
        monkeypatch.setattr(
            functions, "accuracy", lambda p, _, kept=predictions: kept.append(p.tolist()) or 0.0
        )
        for task in tasks:
            trainer(task)
        found.append(predictions)
    assert found[0] == found[1]
    for name, state in weights.items():  # from scratch, or from the run's
        same = all(torch.equal(value, finished[key]) for key, value in state.items())
        assert same == ("finetune" in name)
    assert len(weights) == 5


@pytest.mark.parametrize(
    ("draws", "part", "transductive"),
    [("balanced", "test", False), ("random", "validation", False), ("balanced", "test", True)],
)
def test_a_draw_is_the_same_for_all_methods_and_no_other(
    tmp_path, monkeypatch, draws, part, transductive
):
    seen = {}

    def spy(mine):
        seen[task] = mine, torch.initial_seed()
        return torch.zeros(len(mine.test), dtype=torch.long)

    for name in ("mean", "linear", "scratch"):
        method = classifiers.METHODS[name]._replace(predict=spy)
        monkeypatch.setitem(classifiers.METHODS, name, method)
    changes = {"dataset": "digits", "draws": draws, "evaluate_on": part, "seed": 3}
    config = make_config(tmp_path, transductive=transductive, **changes)
    whole = few_labels.load_data(config)
    data = whole.evaluated_on(part)
    starts = few_labels.read_starts(())
    tasks = [scores.Task("mean", "pixels", 20, draw) for draw in range(3)]
    tasks += [task._replace(method="linear") for task in tasks]
    tasks += [task._replace(method="scratch", start="nothing") for task in tasks[:3]]
    few_labels.prepare(tmp_path, tasks, starts, config, data)
    trainer = few_labels.Trainer(config, tmp_path)
    for task in tasks:
        row = trainer(task)
        share = (data.test.labels == 0).double().mean().item()
        assert row["accuracy"] == pytest.approx(share)  # of class 0, which is said of all
        assert row["macro_f1"] == pytest.approx(2 * share / (1 + share) / 10)
    pixels = data.train.images.flatten(1).double().numpy()
    mean, std = pixels.mean(0), pixels.std(0)
    for task, (mine, seed) in seen.items():
        first = seen[tasks[task.draw]][0]
        assert torch.equal(mine.chosen, first.chosen)
        assert seed == mine.seed == 3 + task.draw
        assert torch.equal(mine.labels, data.train.labels[mine.chosen])
        assert (mine.labels.bincount(minlength=10) == 2).all() == (draws == "balanced")
        assert torch.equal(mine.test.images, data.test.images)
        expected = [data.train.images, *[data.test.images] * transductive]
        assert torch.equal(mine.images.images, torch.cat(expected))
        if task.start == "pixels":
            ours = mine.features["known"].numpy()
            theirs = (pixels[mine.chosen] - mean) / np.where(std > 0, std, np.inf)
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    a, b, c = (set(seen[task][0].chosen.tolist()) for task in tasks[:3])
    assert len(a & b) < 10
    assert len(a & c) < 10
    monkeypatch.setattr(trainer, "config", dataclasses.replace(config, seed=4))
    trainer(task := tasks[0])
    assert set(seen[task][0].chosen.tolist()) not in (a, b)  # nor another seed's next


def test_transductive_methods_are_marked(pretrained, tmp_path):
    config = make_config(tmp_path, runs=(pretrained["a"],), transductive=True, labels="20")
    few_labels.main(dataclasses.replace(config, methods="mean,spreading"))
    names = {row["name"] for row in read(tmp_path / "few_labels" / "run", "scores")}
    assert names == {
        *("nearest mean, pixels", "label spreading, pixels (transductive)"),
        *("nearest mean, simsiam/a", "label spreading, simsiam/a (transductive)"),
    }


def test_runs_together_have_their_features_side_by_side(pretrained, tmp_path, user_error):
    runs = (pretrained["a"], pretrained["b"])
    with user_error("--together"):
        few_labels.read_starts(runs[:1], together=True)
    config = make_config(tmp_path, runs=runs, dataset="digits", labels="20", methods="linear,fused")
    config = dataclasses.replace(config, neighbours=3)
    few_labels.main(dataclasses.replace(config, together=True))
    rows = {
        (row["method"], row["start"]): float(row["accuracy"])
        for row in read(tmp_path / "few_labels" / "run")
        if row["draw"] == "0"
    }
    assert {start for _, start in rows} == {"pixels", "simsiam/a", "simsiam/b", "all 2 runs"}
    starts, data = few_labels.read_starts(runs), few_labels.load_data(config)
    names = ("simsiam/a", "simsiam/b", "pixels")
    parts = [few_labels.extract(starts[name], data, config) for name in names]
    chosen = datasets.draw_labels(data.train.labels, 20, (config.seed, 0))
    labels = data.train.labels[chosen]
    train, test = (torch.cat([part[k] for part in parts[:2]], 1) for k in ("train", "test"))
    predictions = functions.logistic_regression(train[chosen], labels, test).argmax(1)
    assert rows["linear", "all 2 runs"] == functions.accuracy(predictions, data.test.labels)
    pairs = [(part["train"], part["test"]) for part in parts]
    found = graphs.find_neighbourhood(pairs, 3, False)
    found = {name: values.numpy() for name, values in found.items()}
    near = graphs.normalized_graph(found["near"], found["where"])
    marks = F.one_hot(labels, 10).double().numpy()
    spread = graphs.spread(near, chosen.numpy(), marks, config.alpha)
    spread = graphs.average_neighbours(spread, found["test_near"], found["test_where"])
    predictions = torch.from_numpy(spread.argmax(1))
    assert rows["fused", "all 2 runs"] == functions.accuracy(predictions, data.test.labels)
    for row in read(tmp_path / "few_labels" / "run", "scores"):
        if "all 2 runs" in row["name"]:
            both = sum(
                files.read_json(Path(run) / "summary.json")["pretrain_seconds"] for run in runs
            )
            assert float(row["minutes"]) >= both / 60


@pytest.mark.usefixtures("unrendered_pictures")
def test_a_resumed_comparison_keeps_its_runs_and_takes_more(pretrained, tmp_path, user_error):
    a, b, c = pretrained.values()
    config = make_config(tmp_path, runs=(a, b), dataset="digits", methods="linear", together=True)
    few_labels.main(config)
    folder = tmp_path / "few_labels" / "run"
    for runs in ((b, a), (c, a, b), (a,), ()):
        other = dataclasses.replace(config, runs=runs, resume=str(folder), together=False)
        with user_error(f"compares {a} {b}: name them first"):
            few_labels.main(dataclasses.replace(other, methods="linear,mlp"))
    few_labels.main(dataclasses.replace(config, runs=(a, b, c), resume=str(folder)))
    starts = [row["start"] for row in read(folder)]
    assert (starts.count("all 2 runs"), starts.count("all 3 runs")) == (3, 3)
    assert "all 2 runs" not in (folder / "summary.json").read_text()


def test_without_runs_there_are_the_methods_without_pretraining(tmp_path):
    config = make_config(tmp_path, dataset="digits", methods="scratch,linear", labels="20,all")
    few_labels.main(dataclasses.replace(config, evaluate_on="validation"))
    rows = read(tmp_path / "few_labels" / "run")
    counts = {(row["method"], row["start"], row["labels"]) for row in rows}
    assert counts == {
        (m, s, n) for m, s in [("scratch", "nothing"), ("linear", "pixels")] for n in ("20", "1293")
    }
    exact = [row for row in rows if (row["method"], row["labels"]) == ("linear", "1293")]
    assert len(exact) == 1  # there is one draw of all images


# --------------------------------------------------------------------------------- the numbers


def make_rows(values):
    return [
        {"method": m, "start": m, "labels": 10, "draw": draw, "name": m, "seconds": 60.0}
        | {"accuracy": value, "macro_f1": value}
        for m, draws in values.items()
        for draw, value in enumerate(draws)
    ]


def test_differences_are_paired_with_students_interval():
    mine, theirs, weak = [0.7, 0.8, 0.65, 0.9], [0.6, 0.75, 0.6, 0.7], [0.1, 0.2, 0.3, 0.4]
    rows = make_rows({"mine": mine, "theirs": theirs, "weak": weak})
    means = scores.summarize(rows, {"mine": 30.0})
    (found,) = scores.find_differences(rows, frozenset({"theirs", "weak"}))
    expected = stats.ttest_rel(mine, theirs).confidence_interval(0.95)
    assert (found["name"], found["opponent"], found["draws"]) == ("mine", "theirs", 4)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["difference"] == pytest.approx(np.mean(mine) - np.mean(theirs))
    assert [mean["minutes"] for mean in means] == [1.5, 1.0, 1.0]
    shown = {**found, "difference": -0.05, "low": -0.112, "high": 0.012}
    _, _, third, minutes = scores.make_tables(means, [shown]).split("\n\n")
    assert "| -5.0 [-11.2, +1.2] " in third
    assert minutes.splitlines()[2].replace(" ", "") == "|mine|1.5|"


def test_several_runs_of_a_name_are_averaged_within_each_draw():
    values = {"a": [0.5, 0.7, 0.8], "b": [0.9, 0.6, 0.7], "theirs": [0.6, 0.6, 0.5]}
    rows = [
        row | {"name": "mine" if row["start"] in "ab" else row["start"]}
        for row in make_rows(values)
    ]
    (found,) = scores.find_differences(rows, frozenset({"theirs"}))
    mine = np.mean([values["a"], values["b"]], 0)
    low, high = stats.ttest_rel(mine, values["theirs"]).confidence_interval(0.95)
    means = [np.mean(values["a"]), np.mean(values["b"])]  # other seeds would bring others
    least, most = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    half = np.hypot((high - low) / 2, (most - least) / 2)
    difference = np.mean(mine) - np.mean(values["theirs"])
    expected = (difference, difference - half, difference + half)
    assert (found["difference"], found["low"], found["high"]) == pytest.approx(expected)
    assert found["draws"] == 3
    first, _ = scores.summarize(rows, {"a": 60.0, "b": 120.0})
    everything = [*values["a"], *values["b"]]
    assert first["accuracy_sd"] == first["macro_f1_sd"] == pytest.approx(np.std(everything, ddof=1))
    assert (first["runs"], first["trainings"], first["minutes"]) == (2, 6, 2.5)


def test_each_table_and_the_figure_show_their_own_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(scores.figures, "save_figure", lambda figure, path: drawn.append(figure))
    rows = [
        {"name": name, "labels": count, "accuracy": value, "accuracy_sd": 0.02, "minutes": 3.0}
        | {"macro_f1": value / 2, "macro_f1_sd": 0.01}
        for name, pair in {"a": (0.5, 0.9), "b": (0.7, 0.8), "c, run": (0.6, 0.95)}.items()
        for count, value in zip((10, 100), pair, strict=True)
    ]
    tables = scores.make_tables(rows, []).split("\n\n")
    assert "| a                        | 50.0 ± 2.0 | 90.0 ± 2.0 |" in tables[0]
    assert "| a                        | 25.0 ± 1.0 | 45.0 ± 1.0 |" in tables[1]
    styles = {"a": ("", "red", "-"), "b": ("", "blue", "-"), "c, run": ("run", "black", "-")}
    scores.plot_scores(tmp_path / "a.png", rows, styles, "title")
    (figure,) = drawn
    without, panel = ({line.get_label(): line for line in axes.lines} for axes in figure.axes)
    assert without.keys() == {"a", "b"}
    assert panel["c"].get_xydata().tolist() == [[10, 60], [100, 95]]
    best = panel["best without pretraining"].get_xydata()
    np.testing.assert_allclose(best, [[10, 70], [100, 90]])
    band = figure.axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((58, 97))  # mean ± sd


def test_the_best_rival_is_the_best_of_the_draws_that_all_rivals_share():
    quick, slow = [0.7] * 5 + [0.5] * 15, [0.6] * 5  # by all of its draws "quick" is worse
    rows = make_rows({"mine": [0.72] * 5 + [0.6] * 15, "quick": quick, "slow": slow})
    (found,) = scores.find_differences(rows, frozenset({"quick", "slow"}))
    assert (found["opponent"], found["draws"]) == ("quick", 20)
    assert found["difference"] == pytest.approx((5 * 0.02 + 15 * 0.1) / 20)


def test_what_is_trained_once_stands_beside_every_draw():
    mine = [0.8, 0.81, 0.82, 0.83, 0.84]
    (found,) = scores.find_differences(
        make_rows({"mine": mine, "exact": [0.8]}), frozenset({"exact"})
    )
    expected = stats.ttest_1samp(mine, 0.8).confidence_interval(0.95)
    assert found["difference"] == pytest.approx(0.02)
    assert (found["low"], found["high"]) == pytest.approx(tuple(e - 0.8 for e in expected))
    (found,) = scores.find_differences(
        make_rows({"a": [0.9], "exact": [0.8]}), frozenset({"exact"})
    )
    assert (found["draws"], found["low"]) == (1, None)


def test_the_time_left_is_known_when_every_kind_has_been_done():
    rows = make_rows({"a": [0.5, 0.6]})
    tasks = [scores.Task("a", "a", 10, 2), scores.Task("a", "other run", 10, 3)]
    assert scores.estimate_time(tasks, rows, 2) == "about 1m00s"
    tasks.append(scores.Task("b", "a", 10, 0))
    assert scores.estimate_time(tasks, rows, 1) == "more than 2m00s"


# ----------------------------------------------------------------------- settings and mistakes


def parse(line):
    return settings.parse_config(few_labels.Config, line.split(), "")


def test_runs_stand_without_a_flag(tmp_path):
    config = parse("a b/c --labels 10 --workers 2")
    assert (config.runs, config.labels, config.workers) == (("a", "b/c"), "10", 2)
    assert parse("--labels 10").runs == ()
    record = {"script": "few_labels", **dataclasses.asdict(config)}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert settings.load_config(few_labels.Config, tmp_path) == config
    assert parse(f"--resume {tmp_path}").runs == ("a", "b/c")
    words = [w for ws in settings.changed_flags(record, few_labels.Config).values() for w in ws]
    assert parse(" ".join(words)) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--methods magic", "--methods knows scratch,tuned"),
        ("--labels ten", "--labels takes whole numbers"),
        ("--quick-draws 1", "--quick-draws must be at least 2"),
        ("--workers 0", "--workers must be at least 1"),
        ("--alpha 1", "--alpha must be between 0 and 1"),
        ("--threshold 2", "--threshold must be in [0, 1]"),
        ("--crop-scale-min 2", "--crop-scale-min must be at most 1"),
        ("--penalty 0", "--penalty must be positive"),
        ("--draws some", "--draws: invalid choice"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line(line, message, user_error):
    with user_error(message):
        parse(line)


def test_one_data_set_may_be_spelled_in_two_ways(tmp_path, user_error):
    for name, dataset, data in (("a", "plants", "1f"), ("b", "plants/", "1f"), ("c", "other", "2")):
        (tmp_path / name).mkdir()
        record = {"dataset": dataset, "data": data}
        (tmp_path / name / "config.json").write_text(json.dumps(record))
    a, b, c = (str(tmp_path / name) for name in "abc")
    config = few_labels.Config(runs=(a, b))
    assert few_labels.with_data_of_runs(config).dataset.rstrip("/") == "plants"
    with user_error("several data sets: other, plants", "--dataset"):
        few_labels.with_data_of_runs(few_labels.Config(runs=(a, c)))
    told = dict(report.changed_rows({"runs": [a, b]}, few_labels.Config))
    assert told["--runs"].startswith(f"{a} {b} ")


def test_images_are_read_as_the_runs_read_them(tmp_path, user_error):
    record = {"dataset": "cells", "data": "1f", "image_size": 64, "channels": 1, "stack": "first"}
    record |= {"value_range": [0, 4095], "data_dir": "/big"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record))
    config = few_labels.Config(runs=(str(tmp_path),))
    read = few_labels.with_data_of_runs(config)
    assert {name: getattr(read, name) for name in record.keys() - {"data", "value_range"}} == {
        name: record[name] for name in record.keys() - {"data", "value_range"}
    }
    assert read.value_range == (0, 4095)
    elsewhere = dataclasses.replace(config, data_dir="mine", image_size=64)
    assert few_labels.with_data_of_runs(elsewhere).data_dir == "mine"
    for name, value in {"image_size": 48, "channels": 3, "value_range": (0.0, 255.0)}.items():
        with user_error(settings.flag(name), "leave the flag out"):
            few_labels.with_data_of_runs(dataclasses.replace(config, **{name: value}))
    path.write_text(json.dumps({"data": "1f"}))
    with user_error("names no data set"):
        few_labels.with_data_of_runs(config)


def test_a_run_may_have_seen_a_part_of_the_training_images(tmp_path, user_error, capsys):
    digits = functions.load_images("digits")
    runs = {}
    for part in ("test", "validation", "fold-1", "fold-2"):
        folder = tmp_path / part
        folder.mkdir()
        data = digits.evaluated_on(part).fingerprint()
        record = {"dataset": "digits", "data": data, "evaluate_on": part}
        (folder / "config.json").write_text(json.dumps(record))
        runs[part] = few_labels.Start(part, ("features",), 0.0, folder)
    config = few_labels.Config(runs=tuple(map(str, tmp_path.iterdir())), evaluate_on="validation")
    assert few_labels.with_data_of_runs(config).dataset == "digits"
    few_labels.check_runs(config, runs, digits)
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["test", "fold-1", "fold-2"]  # whose training images were not those of now
    runs["fold-1"] = runs["fold-2"]
    (tmp_path / "fold-2/config.json").write_text(json.dumps({**record, "evaluate_on": "fold-1"}))
    with user_error("fold-1 was trained on other images"):
        few_labels.check_runs(config, runs, digits)


def test_runs_that_do_not_fit_are_one_line(pretrained, tmp_path, user_error):
    a = pretrained["a"]
    with user_error("simsiam/a is given twice"):
        few_labels.main(make_config(tmp_path, runs=(a, a)))
    with user_error("trained on other images than fashion-mnist"):
        few_labels.main(make_config(tmp_path, runs=(a,), dataset="fashion-mnist"))
    with user_error("there is nothing to train"):
        few_labels.main(make_config(tmp_path, methods="finetune", dataset="digits"))
    with user_error("config.json"):
        few_labels.main(make_config(tmp_path, runs=(str(tmp_path),)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["scratch", "linear"])
def test_an_encoder_that_does_not_say_what_it_is_is_one_line(
    pretrained, tmp_path, user_error, method
):
    run = Path(shutil.copytree(pretrained["a"], tmp_path / "a"))
    weights, _ = checkpoints.load_tensors(run / "encoder.safetensors")
    checkpoints.save_tensors(run / "encoder.safetensors", weights, {})
    with user_error("encoder.safetensors does not say what encoder it is"):
        few_labels.main(make_config(tmp_path, runs=(str(run),), methods=method))


# ---------------------------------------------------------------------------- older run folders


def test_a_run_of_a_version_with_the_study_goes_on(pretrained, tmp_path):
    record = json.loads((Path(pretrained["a"]) / "config.json").read_text())
    record |= {"stages": "pretrain,probe,study", "labels": "10,all", "label_seeds": 5}
    (tmp_path / "config.json").write_text(json.dumps(record | {"label_steps": 2000}))
    config = settings.load_config(simsiam.Config, tmp_path)
    assert config.stages == "pretrain,probe"
    words = settings.changed_flags(record, simsiam.Config)
    assert words["--stages"] == ["--stages", "pretrain,probe"]
    with pytest.raises(UserError, match="--stages knows pretrain,probe,embed"):
        simsiam.Config(stages="pretrain,study")
