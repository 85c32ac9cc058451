import copy
import math
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import evaluation
import functions
from support import checkpoints, datasets, devices, encoders, figures, files

REPOSITORY = Path(functions.__file__).parent


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def labels_of(count, classes, seed=0):
    return torch.randint(classes, (count,), generator=seeded(seed))


# digits


def test_digits_are_scikit_learns_each_once():
    from sklearn.datasets import load_digits

    data = functions.load_images("digits")
    assert data.classes == tuple("0123456789")
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert data.train.images.dtype == data.test.images.dtype == torch.uint8
    assert data.train.labels.dtype == data.test.labels.dtype == torch.int64
    images = torch.cat((data.train.images, data.test.images)).flatten(1).numpy()
    labels = torch.cat((data.train.labels, data.test.labels)).numpy()
    arrived = sorted((label, *image) for label, image in zip(labels, images, strict=True))
    reference = load_digits()
    wanted = sorted(
        (label, *np.rint(image / 16 * 255))
        for label, image in zip(reference.target, reference.data, strict=True)
    )
    np.testing.assert_array_equal(arrived, wanted)


def test_digits_split_is_stratified_and_always_the_same():
    np.random.seed(1)
    torch.manual_seed(1)
    first = functions.load_images("digits")
    np.random.seed(2)
    torch.manual_seed(2)
    second = functions.load_images("digits")
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)
    assert torch.equal(first.test.labels, second.test.labels)
    inside, outside = (split.labels.bincount() for split in (first.train, first.test))
    assert (outside / (inside + outside) - 0.2).abs().max() < 0.01


# the real data sets, where this machine has them


def test_real_fashion_mnist(tmp_path, monkeypatch):
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", folder)
    data = functions.load_images("fashion-mnist", tmp_path)
    assert data.train.images.shape == (60000, 1, 28, 28)
    assert data.test.images.shape == (10000, 1, 28, 28)
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    # Published statistics: mean 0.2860, standard deviation 0.3530.
    assert data.train.images.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)
    # Trousers are the narrowest thing in the wardrobe, bags fill most of the picture.
    filled = (data.train.images > 0).float().mean((1, 2, 3))
    means = {name: filled[data.train.labels == i].mean() for i, name in enumerate(data.classes)}
    assert data.classes.index("Ankle boot") == 9
    assert means["Trouser"] < min(means[name] for name in ("Bag", "Coat", "Pullover", "Shirt"))


def test_real_cifar10_images():
    folder = REPOSITORY / "data" / "cifar10-images"
    if not folder.is_dir():
        pytest.skip("data/cifar10-images is not there")
    data = functions.load_images(str(folder), REPOSITORY / "data")
    assert data.train.images.shape == (50000, 3, 32, 32)
    assert data.test.images.shape == (10000, 3, 32, 32)
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.classes[0] == "airplane"
    means = data.train.images[::5].numpy().mean((0, 2, 3)) / 255
    np.testing.assert_allclose(means, (0.4914, 0.4822, 0.4465), atol=0.002)


# accuracy


@pytest.fixture(scope="module")
def digits():
    data = functions.load_images("digits")
    return (
        datasets.to_float(data.train.images).flatten(1),
        data.train.labels,
        datasets.to_float(data.test.images).flatten(1),
        data.test.labels,
    )


def naive_knn(train, train_labels, test, test_labels, k, temperature):
    correct = 0
    for query, label in zip(test.double(), test_labels.tolist(), strict=True):
        cosine = F.cosine_similarity(query[None], train.double()).tolist()
        votes = {}
        for s, i in sorted(zip(cosine, range(len(train)), strict=True), reverse=True)[:k]:
            vote = train_labels[i].item()
            votes[vote] = votes.get(vote, 0) + math.exp(s / temperature)
        correct += max(votes, key=votes.get) == label
    return correct / len(test_labels)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 5, 30, 1000])
def test_knn_equals_a_naive_loop(k, temperature):
    train_labels, test_labels = labels_of(50, 4), labels_of(60, 5, seed=1)
    centres = normal(5, 6)
    train = (centres[train_labels] + normal(50, 6, seed=1)) * torch.linspace(0.1, 9, 50)[:, None]
    test = centres[test_labels] + normal(60, 6, seed=2)
    expected = naive_knn(train, train_labels, test, test_labels, k, temperature)
    assert 0.1 < expected < 0.9
    result = functions.knn_accuracy(train, train_labels, test, test_labels, k, temperature)
    assert result == pytest.approx(expected, abs=1e-6)


def test_probe_is_as_good_as_logistic_regression(digits):
    train, train_labels, test, test_labels = digits
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=500).fit(scaler.transform(train), train_labels)
    expected = model.score(scaler.transform(test), test_labels)
    result = functions.linear_probe(*digits, epochs=40, batch_size=128)
    assert result.accuracy > 0.9
    assert result.accuracy == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("rate", "decay", "size", "settings"),
    [
        (0.05, 0.1, 16, {"learning_rate": 0.05, "weight_decay": 0.1, "batch_size": 16}),
        (1 / 20, 1e-3, 512, {}),  # the defaults, of 20 features
    ],
)
def test_probe_equals_a_naive_loop(rate, decay, size, settings):
    count = size + 44
    inputs = (
        normal(count, 20) * 3 + 1,
        labels_of(count, 3),
        normal(40, 20, seed=1),
        labels_of(40, 3),
    )
    (train, labels, test, test_labels), epochs = inputs, 4
    scaler = StandardScaler().fit(train)
    train, test = (torch.from_numpy(scaler.transform(x)).float() for x in (train, test))
    layer = nn.Linear(20, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), rate, weight_decay=decay)
    cosine = CosineAnnealingLR(optimizer, epochs * math.ceil(count / size))
    expected = []
    for epoch in range(epochs):
        total = 0
        order = torch.randperm(count, generator=devices.epoch_generator(3, epoch))
        for index in order.split(size):
            loss = F.cross_entropy(layer(train[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            total += loss.item() * len(index)
        expected.append((total / count, F.cross_entropy(layer(test), test_labels).item()))
    result = functions.linear_probe(*inputs, epochs, **settings, seed=3)
    found = [(row["train_loss"], row["test_loss"]) for row in result.history]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
    assert torch.equal(result.predictions, layer(test).argmax(1))


def test_probe_does_not_mind_how_often_a_feature_comes():
    train, labels, test = normal(120, 6), labels_of(120, 3), normal(40, 6, seed=1)
    once, often = (
        functions.linear_probe(
            train.repeat(1, times), labels, test.repeat(1, times), labels[:40], 5, weight_decay=0
        )
        for times in (1, 16)
    )
    found, expected = ([row["test_loss"] for row in r.history] for r in (often, once))
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected), rtol=0.15, atol=0
    )  # but for the bias


def test_probe_reports_the_last_epoch():
    # Known mistake: the maximum over epochs on the test set. Wrong labels make the probe overfit,
    # so that an early epoch is the best.
    train, test = normal(60, 40), normal(100, 40, seed=1)
    labels, test_labels = (train[:, 0] > 0).long(), (test[:, 0] > 0).long()
    labels[::4] = 1 - labels[::4]
    result = functions.linear_probe(train, labels, test, test_labels, 40, learning_rate=0.1)
    accuracies = [row["test_accuracy"] for row in result.history]
    assert max(accuracies) > accuracies[-1] + 0.02
    assert result.accuracy == accuracies[-1]
    expected = metrics.accuracy_score(test_labels, result.predictions)
    assert result.accuracy == pytest.approx(expected)


def test_probe_history_has_a_row_per_epoch():
    labels, test_labels = labels_of(60, 3), labels_of(40, 3, seed=1)
    corners = torch.eye(3)
    inputs = corners[labels], labels, corners[test_labels], test_labels
    history = functions.linear_probe(*inputs, epochs=4, learning_rate=0.1, batch_size=20).history
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    for key in ("train_loss", "test_loss"):
        assert history[-1][key] < history[0][key] < math.log(3)
    assert history[-1]["train_accuracy"] == history[-1]["test_accuracy"] == 1


def test_probe_standardises_features():
    inputs = normal(60, 20), labels_of(60, 3), normal(40, 20, seed=1), labels_of(40, 3, seed=1)
    scale, shift = torch.logspace(-3, 3, 20), torch.linspace(-1, 1, 20)
    moved = inputs[0] * scale + shift, inputs[1], inputs[2] * scale + shift, inputs[3]
    first, second = (functions.linear_probe(*x, epochs=5).history[-1] for x in (inputs, moved))
    assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-3)
    assert first["test_loss"] == pytest.approx(second["test_loss"], rel=1e-3)


def drifting_encoder():
    """BatchNorm and dropout: both would show in train mode."""
    torch.manual_seed(0)
    encoder = encoders.SmallEncoder(1, 8)
    encoder.append(nn.Dropout(0.5))
    encoder(torch.rand(16, 1, 8, 8))  # running statistics other than the initial ones
    return encoder


def random_split(count, channels=1, mean=0.0, std=1.0):
    images = torch.randint(256, (count, channels, 8, 8), generator=seeded(), dtype=torch.uint8)
    statistics = [torch.full((channels,), value) for value in (mean, std)]
    return datasets.Split(images, None, None, *statistics)


def test_features_equal_a_manual_forward_in_eval_mode():
    encoder = drifting_encoder()
    split = random_split(23, mean=0.3, std=0.2)
    manual = copy.deepcopy(encoder).eval()
    expected = manual((split.images.double() / 255 - 0.3).div(0.2).float()).detach()
    for batch_size in (1, 4, 23, 500):
        result = functions.extract_features(encoder, split, batch_size=batch_size)
        assert not result.requires_grad
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


# Known mistake of public versions: the frozen encoder's BatchNorm statistics drift.
@pytest.mark.parametrize("training", [True, False])
def test_extraction_leaves_the_encoder_as_it_is(training):
    encoder = drifting_encoder().train(training)
    encoder[2].eval()  # one part in another mode than the whole
    before = copy.deepcopy(encoder.state_dict())
    modes = [module.training for module in encoder.modules()]
    functions.extract_features(encoder, random_split(20), batch_size=6)
    assert [module.training for module in encoder.modules()] == modes
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


def test_extraction_restores_the_mode_after_an_error():
    encoder = drifting_encoder()
    with pytest.raises(RuntimeError):
        functions.extract_features(encoder, random_split(2, channels=5))
    assert encoder.training
    assert torch.is_grad_enabled()


# what is measured while an encoder trains


class Seeing(nn.Module):
    """An encoder whose features are its inputs, and which remembers each look at images."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.looks = []

    def forward(self, images):
        self.looks.append(images.flatten(1))
        return images.flatten(1) * self.weight


def numbered(count):
    """A split without normalisation whose images are noise, each with its number in front."""
    images = torch.randint(256, (count, 3, 2, 2), generator=seeded(), dtype=torch.uint8)
    numbers = torch.arange(count)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = (numbers // 256).byte(), (numbers % 256).byte()
    return datasets.Split(images, labels_of(count, 3), None, torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(
    ("count", "queries", "bank"), [(300, 60, 240), (26_000, 5_000, 20_000), (4, 1, 3)]
)
def test_the_monitor_looks_a_fifth_of_the_images_up_among_the_others(count, queries, bank):
    split, encoder = numbered(count), Seeing()
    monitor = functions.Monitor(split, 2, None)
    row = monitor.measure(encoder, normal(50, 4), 2, False)
    assert [len(part) for part in (monitor.bank, monitor.queries)] == [bank, queries]
    seen = (torch.cat(encoder.looks) * 255).round().long()
    numbers = (seen[:, 0] * 256 + seen[:, 1]).tolist()
    assert len(set(numbers)) == len(numbers) == queries + bank  # no image is on both sides
    assert numbers[:bank] != sorted(numbers[:bank])  # a class after the other would leave some out
    if count == 300:
        features = datasets.to_float(split.images).flatten(1)
        known, asked = torch.tensor(numbers[:bank]), torch.tensor(numbers[bank:])
        pairs = features[known], split.labels[known], features[asked], split.labels[asked]
        assert row["knn_held_out"] == pytest.approx(naive_knn(*pairs, 200, 0.1), abs=1e-6)


def test_the_monitor_looks_when_it_is_due_and_in_the_last_epoch():
    z = normal(50, 4)
    due = functions.Monitor(numbered(50), 3, None)
    rows = {epoch: due.measure(Seeing(), z, epoch, epoch == 7) for epoch in range(1, 8)}
    assert [epoch for epoch, row in rows.items() if "knn_held_out" in row] == [3, 6, 7]
    for row in rows.values():
        assert row["embedding_std"] == functions.embedding_std(z)
        assert row["rank_me"] == functions.rank_me(z)
    unlabelled = datasets.Split(numbered(50).images, None)
    for never in (functions.Monitor(numbered(50), 0, None), functions.Monitor(unlabelled, 3, None)):
        assert "knn_held_out" not in never.measure(Seeing(), z, 3, True)


def test_embedding_std_equals_numpy():
    z = normal(40, 5).numpy().astype(np.float64) + 0.5
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    result = functions.embedding_std(torch.from_numpy(z))
    assert result == pytest.approx(unit.std(0, ddof=1).mean(), rel=1e-5)


def test_rank_me_from_collapse_to_isotropy():
    assert functions.rank_me(normal(200, 1) @ normal(1, 32)) == pytest.approx(1, abs=0.01)
    assert functions.rank_me(torch.eye(32)) == pytest.approx(32, rel=1e-4)
    assert functions.rank_me(normal(5000, 32)) == pytest.approx(32, rel=0.01)
    assert functions.rank_me(normal(10, 32)) <= 10
    three = torch.zeros(3, 32)
    three[range(3), range(3)] = 5.0
    assert functions.rank_me(three) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(("count", "size"), [(100, 12), (12, 100)])
def test_rank_me_equals_numpy(count, size):
    z = normal(count, size) * torch.logspace(0, -2, size) * torch.logspace(0, -2, count)[:, None]
    values = np.linalg.svd(z.numpy().astype(np.float64), compute_uv=False)
    p = values / values.sum() + 1e-7
    expected = np.exp(-(p * np.log(p)).sum())
    assert 1.5 < expected < 0.8 * min(count, size)
    assert functions.rank_me(z) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("classes", [2, 7])
def test_confusion_matrix_equals_sklearn(classes):
    labels, predictions = labels_of(60, classes), labels_of(60, classes - 1, seed=1)
    result = functions.confusion_matrix(labels, predictions, classes)
    expected = metrics.confusion_matrix(labels, predictions, labels=range(classes))
    assert result.tolist() == expected.tolist()
    score = metrics.accuracy_score(labels, predictions)
    assert functions.accuracy(predictions, labels) == pytest.approx(score)
    names = [f"class {i}" for i in range(classes)]
    accuracies = functions.per_class_accuracy(result, names)
    recall = metrics.recall_score(labels, predictions, average=None, zero_division=0)
    assert list(accuracies) == names
    assert list(accuracies.values()) == pytest.approx(recall)


def test_predictions_of_another_shape_have_no_accuracy(user_error):
    labels = torch.arange(4)
    for wrong in (labels[:, None], labels[:3]):
        with user_error("same shape"):
            functions.accuracy(wrong, labels)
    with user_error("without labels"):
        functions.accuracy(labels[:0], labels[:0])


def test_per_class_accuracy_leaves_out_a_class_without_images():
    matrix = functions.confusion_matrix(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]), 4)
    assert functions.per_class_accuracy(matrix, "abcd") == {"a": 0.5, "c": 1.0}


def few_label_data():
    """Three classes of 60, 20 and 8; the test images are spread and shifted otherwise."""
    labels, test_labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 8), labels_of(80, 3)
    centres = normal(3, 4)
    train = centres[labels] + normal(88, 4, seed=1)
    test = (centres[test_labels] + normal(80, 4, seed=2)) * torch.tensor([1, 3, 0.3, 1]) + 1
    return train, labels, test, test_labels


def test_few_label_draws_are_balanced_and_differ(monkeypatch):
    seen = []
    fit = LogisticRegression.fit

    def recording_fit(self, x, y, *args, **kwargs):
        seen.append((np.asarray(x), np.asarray(y)))
        return fit(self, x, y, *args, **kwargs)

    monkeypatch.setattr(LogisticRegression, "fit", recording_fit)
    train, labels, test, test_labels = few_label_data()
    scaler = StandardScaler().fit(train.numpy())  # of all training images, and of no others
    length = np.sqrt(train.shape[1])

    def prepare(features):
        return length * normalize(scaler.transform(features.numpy()))

    rows = prepare(train)
    result = functions.few_label_accuracy(train, labels, test, test_labels, 5)
    assert (result["labels_per_class"], result["draws"]) == (5, 5)
    assert len(seen) == 5
    for x, y in seen:
        assert np.bincount(y).tolist() == [5, 5, 5]
        assert len(np.unique(x, axis=0)) == 15
        distances = np.linalg.norm(x[:, None] - rows, axis=2)  # (15, N)
        assert distances.min(1).max() < 1e-5
        assert labels[distances.argmin(1)].tolist() == y.tolist()
    assert len({x.tobytes() for x, _ in seen}) == 5
    # The numbers are mean and sample deviation of logistic regressions on these draws.
    models = [fit(LogisticRegression(max_iter=2000), x, y) for x, y in seen]
    scores = [model.score(prepare(test), test_labels) for model in models]
    assert result["mean"] == pytest.approx(np.mean(scores))
    assert result["sd"] == pytest.approx(np.std(scores, ddof=1))
    assert result["sd"] > 0
    # The test images' own statistics would give another result.
    leaked = length * normalize(StandardScaler().fit_transform(test.numpy()))
    assert scores != [model.score(leaked, test_labels) for model in models]


@pytest.mark.parametrize(("asked", "given"), [(8, 8), (500, 8)])
def test_few_labels_are_no_more_than_the_smallest_class_has(asked, given):
    result = functions.few_label_accuracy(*few_label_data(), asked)
    assert (result["labels_per_class"], result["draws"]) == (given, 5)
    assert result["mean"] == functions.few_label_accuracy(*few_label_data(), given)["mean"]


# the stage that the scripts share, and its files


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """The probe stage of an untrained encoder on 90 digits: its folder, data, model, results."""
    folder = tmp_path_factory.mktemp("probed")
    whole = functions.load_images("digits")
    test = whole.test.select(functions.fixed_permutation(len(whole.test))[:90].sort().values)
    data = datasets.ImageData("digits", whole.classes, whole.train, test)
    torch.manual_seed(0)
    model = SimpleNamespace(encoder=encoders.SmallEncoder(1, 8))
    settings = {"probe_epochs": 8, "seed": 1, "pixel_baseline": True, "few_labels": 3}
    result = evaluation.probe(model, data, SimpleNamespace(**settings), folder, None)
    return SimpleNamespace(folder=folder, data=data, model=model, result=result)


def test_probe_stage_measures_the_frozen_encoder_and_the_pixels(probed):
    labels = probed.data.train.labels, probed.data.test.labels
    parts = probed.data.train, probed.data.test
    features = [functions.extract_features(probed.model.encoder, part) for part in parts]
    pixels = [part.images.flatten(1) / 255 for part in parts]
    for inputs, probe, few in (
        (features, "linear_probe_accuracy", "few_label_accuracy_encoder"),
        (pixels, "pixel_probe_accuracy", "few_label_accuracy_pixels"),
    ):
        pairs = inputs[0], labels[0], inputs[1], labels[1]
        expected = functions.linear_probe(*pairs, epochs=8, seed=1).accuracy
        assert probed.result[probe] == expected
        assert probed.result[few] == functions.few_label_accuracy(*pairs, 3)
    assert probed.result["linear_probe_accuracy"] != probed.result["pixel_probe_accuracy"]
    knn = functions.knn_accuracy(features[0], labels[0], features[1], labels[1])
    assert probed.result["knn_accuracy"] == knn


def test_the_saved_probe_repeats_the_predictions(probed):
    probe, about = checkpoints.load_tensors(probed.folder / "probe.safetensors")
    assert about == {"classes": list(probed.data.classes)}
    features = functions.extract_features(probed.model.encoder, probed.data.test)
    saved = files.read_arrays(probed.folder / "predictions.npz")["predictions"]
    logits = functions.apply_probe(features, probe)
    assert np.array_equal(logits.argmax(1).numpy(), saved)
    train = (
        functions.extract_features(probed.model.encoder, probed.data.train).numpy().astype(float)
    )
    scaled = (features.numpy() - train.mean(0)) / train.std(0).clip(1e-6)
    expected = scaled @ probe["weight"].numpy().T + probe["bias"].numpy()
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_what_never_changes_among_training_images_counts_for_nothing():
    draw = torch.Generator().manual_seed(0)
    known, test = (torch.randn(n, 5, generator=draw) for n in (40, 200))
    labels, truth = known.argmax(1), test.argmax(1)
    silent, sudden = (
        (F.pad(known, (0, 1)), labels, F.pad(test, (0, 1), value=value), truth)
        for value in (0.0, 1.0)
    )
    for score in (
        lambda *given: functions.few_label_accuracy(*given, 5)["mean"],
        lambda *given: functions.linear_probe(*given, epochs=5).accuracy,
    ):
        assert score(*sudden) == score(*silent)


@pytest.mark.parametrize(("side", "count"), [(8, 500), (32, 500), (64, 256), (224, 20), (2000, 1)])
def test_large_images_are_evaluated_few_at_a_time(side, count):
    assert functions.images_per_step(torch.empty(3, 1, side, side, device="meta")) == count


def test_predictions_and_maps_tell_which_image_a_row_is_of(probed):
    arrays = files.read_arrays(probed.folder / "predictions.npz")
    assert arrays["index"].tolist() == list(range(90))
    assert arrays["labels"].tolist() == probed.data.test.labels.tolist()
    right = (arrays["predictions"] == arrays["labels"]).mean()
    assert right == pytest.approx(probed.result["linear_probe_accuracy"])
    index, split = evaluation.images_to_map(probed.data)
    mapped = evaluation.identify_images(split, index)
    assert np.array_equal(mapped["labels"], arrays["labels"][mapped["index"]])
    assert torch.equal(split.images, probed.data.test.images[mapped["index"]])


@pytest.mark.parametrize("count", [7, 10_500])
def test_a_map_takes_ten_thousand_images_at_most_in_the_order_of_the_data(count):
    paths = np.array([f"{i}.png" for i in range(count)])
    images = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    split = datasets.Split(images, None, paths)
    index, chosen = evaluation.images_to_map(datasets.ImageData("flat", (), split, None))
    assert len(index) == len(index.unique()) == min(count, 10_000)
    assert index.tolist() == sorted(index.tolist())
    assert chosen.paths.tolist() == [f"{i}.png" for i in index]
    arrays = evaluation.identify_images(chosen, index)
    assert arrays.keys() == {"index", "paths"}
    assert arrays["paths"].tolist() == [f"{i}.png" for i in arrays["index"]]
    if count > 10_000:  # from everywhere, so from all classes of a folder
        assert 450 < (index < 500).sum() < 500
        assert 450 < (index >= 10_000).sum() < 500


@pytest.mark.parametrize(("classes", "lines"), [(20, 20), (200, 11)])
def test_of_many_classes_the_ten_that_are_recognised_least_are_printed(
    tmp_path, capsys, drawn_figures, classes, lines
):
    names = tuple(f"class {i}" for i in range(classes))
    labels = torch.arange(classes).repeat_interleave(4)
    predictions = labels.clone()
    predictions[[0, 4, 5]] = classes - 1  # three of four right in class 0, two in class 1
    split = datasets.Split(torch.zeros(len(labels), 1, 1, 1), labels)
    data = datasets.ImageData("many", names, split, split)
    found = functions.report_classes(predictions, data, tmp_path, "", "title")
    assert found == {**dict.fromkeys(names, 1.0), "class 0": 0.75, "class 1": 0.5}
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == lines
    for name, percent in (("class 0 ", "75.0 %"), ("class 1 ", "50.0 %")):
        assert any(name in line and percent in line for line in shown)


# maps


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("method", "count"), [("tsne", 5), ("tsne", 40), ("umap", 5)])
def test_project_2d_repeats_itself(method, count):
    features = normal(count, 60)
    first = functions.project_2d(features, method, seed=1)
    np.random.seed(7)
    again = functions.project_2d(features, method, seed=1)
    assert first.shape == (count, 2)
    assert np.isfinite(first).all()
    assert first.std(0).min() > 0
    assert np.array_equal(first, again)


def test_project_2d_takes_any_seed_of_a_run():
    # scikit-learn takes no larger ones.
    features = normal(6, 8)
    largest, same = (
        functions.project_2d(features, "tsne", seed) for seed in (2**63 - 1, 2**32 - 1)
    )
    assert np.array_equal(largest, same)


@pytest.mark.parametrize("method", ["tsne", "umap"])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_project_2d_puts_equal_features_at_one_point(method, value):
    # scikit-learn's t-SNE divides by their deviation, and then crashes the process.
    result = functions.project_2d(torch.full((9, 7), value), method, seed=0)
    assert result.shape == (9, 2)
    assert not result.any()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_project_2d_keeps_clusters_by_direction(method):
    # By direction, not by length: cosine distances.
    labels = torch.arange(45) % 3
    features = torch.eye(3, 8)[labels] + 0.05 * normal(45, 8)
    features *= torch.logspace(-2, 2, 45)[torch.randperm(45, generator=seeded())][:, None]
    result = functions.project_2d(features, method, seed=0)
    assert metrics.silhouette_score(result, labels) > 0.5


# plots


def history(epochs):
    names = ("loss", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return [{"epoch": e + 1, **{n: 1 / (e + 2) for n in names}} for e in range(epochs)]


def scatter(path, classes, labelled=True):
    coordinates = normal(60, 2).numpy()
    labels = labels_of(60, classes).numpy() if labelled else None
    names = [f"name {i}" for i in range(classes)] if labelled else ()
    functions.plot_scatter(path, coordinates, labels, names, "title")


def per_class(path, classes):
    functions.plot_per_class(path, {f"name {i}": i / classes for i in range(classes)}, "title")


def confusion(path, classes):
    matrix = functions.confusion_matrix(labels_of(99, classes), labels_of(99, classes), classes)
    functions.plot_confusion_matrix(path, matrix, [f"name {i}" for i in range(classes)], "title")


@pytest.fixture
def drawn_figures(monkeypatch):
    """The figures that would be written."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def curves(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_curves_are_the_columns_of_the_table(tmp_path, drawn_figures):
    rows = [
        {"epoch": 1, "loss": 3.0, "train_loss": 2.0, "other_loss": 4.0}
        | {"train_accuracy": 0.5, "other_accuracy": 0.25},
        {"epoch": 4, "loss": 1.0, "train_loss": 1.0, "other_loss": 5.0}
        | {"train_accuracy": 0.75, "other_accuracy": 0.375},
    ]
    figures.plot_loss(tmp_path / "plot.png", rows, "title")
    functions.plot_loss_and_accuracy(tmp_path / "plot.png", rows, "title", "other")
    (loss,), (losses, accuracies) = (figure.axes for figure in drawn_figures)
    assert curves(loss) == {"train": [[1, 3], [4, 1]]}
    assert curves(losses) == {"train": [[1, 2], [4, 1]], "other": [[1, 4], [4, 5]]}
    assert curves(accuracies) == {"train": [[1, 50], [4, 75]], "other": [[1, 25], [4, 37.5]]}


@pytest.mark.parametrize(("classes", "bars"), [(3, 3), (60, 60), (61, 60)])
def test_bars_are_the_accuracies_and_the_line_is_the_mean_of_all(
    tmp_path, drawn_figures, classes, bars
):
    accuracies = {f"class {i}": 1 - i / classes for i in range(classes)}
    functions.plot_per_class(tmp_path / "plot.png", accuracies, "title")
    axes = drawn_figures[0].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    shown = dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True))
    assert len(shown) == bars
    assert shown == {name: pytest.approx(100 * accuracies[name]) for name in shown}
    assert ("class 0" in shown) == (classes <= 60)  # of many the best are left out
    mean = 100 * sum(accuracies.values()) / classes
    assert axes.lines[0].get_xdata()[0] == pytest.approx(mean)


def test_cells_of_the_confusion_matrix_are_percent_of_the_true_class(tmp_path, drawn_figures):
    matrix = torch.tensor([[995, 5, 0], [0, 994, 6], [300, 0, 700]])
    functions.plot_confusion_matrix(tmp_path / "plot.png", matrix, ["a", "b", "c"], "title")
    cells = {text.get_position()[::-1]: text.get_text() for text in drawn_figures[0].axes[0].texts}
    # What rounds to 0 is left empty.
    assert cells == {(0, 0): "100", (1, 1): "99", (1, 2): "1", (2, 0): "30", (2, 2): "70"}
    shares = drawn_figures[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, matrix / 10)


STRANGE = ["price_$5_$10", "_hidden", "$", "a $ b", "50%", "x^2", r"back\slash", "__"]


def drawn_as(text):
    """What matplotlib draws for a text, when it takes no formula for it."""
    assert not is_math_text(text)
    return text.replace(r"\$", "$").strip()


def test_names_of_classes_are_drawn_letter_by_letter(tmp_path, monkeypatch, drawn_figures):
    count = len(STRANGE)
    coordinates, labels = normal(5 * count, 2).numpy(), np.arange(5 * count) % count
    title = "costs $1_$2"
    functions.plot_scatter(tmp_path / "a.png", coordinates, labels, STRANGE, title)
    functions.plot_per_class(tmp_path / "b.png", dict.fromkeys(STRANGE, 0.5), title)
    matrix = torch.eye(count)
    functions.plot_confusion_matrix(tmp_path / "c.png", matrix, STRANGE, title)
    figures.plot_loss(tmp_path / "d.png", history(3), title)
    functions.plot_loss_and_accuracy(tmp_path / "e.png", history(3), title)
    scatter, bars, cells, *_ = drawn_figures
    shown = [
        [text.get_text() for text in scatter.legends[0].get_texts()],
        [text.get_text() for text in scatter.axes[0].texts],
        [text.get_text() for text in bars.axes[0].get_yticklabels()],
        [text.get_text() for text in cells.axes[0].get_xticklabels()],
        [text.get_text() for text in cells.axes[0].get_yticklabels()],
    ]
    for texts in shown:
        assert [drawn_as(text) for text in texts] == STRANGE
    for i, figure in enumerate(drawn_figures):
        above = figure.get_suptitle() or figure.axes[0].get_title()
        assert drawn_as(above) == title
        figure.savefig(tmp_path / f"{i}.png")  # a formula that is none would end here


@pytest.mark.parametrize("count", [10, 60, 61, 200])
def test_long_names_leave_room_for_the_map(tmp_path, drawn_figures, count):
    names = [f"{i} {'a very long name ' * 5}" for i in range(count)]
    coordinates, labels = normal(2 * count, 2).numpy(), np.arange(2 * count) % count
    functions.plot_scatter(tmp_path / "plot.png", coordinates, labels, names, "title")
    (figure,) = drawn_figures
    figure.savefig(tmp_path / "plot.png")  # which lays it out
    assert figure.axes[0].get_window_extent().width > 0.8 * figure.bbox.width
    assert figure.axes[0].get_window_extent().height > 0.6 * figure.bbox.width
    for legend in figure.legends:
        # The legend is within the figure, below the map, and its lines do not overlap.
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.axes[0].get_window_extent().y0
        texts = [text.get_window_extent() for text in legend.get_texts()]
        assert len(texts) == count
        assert not any(a.overlaps(b) for i, a in enumerate(texts) for b in texts[:i])
    assert bool(figure.legends) == (count <= 60)
    assert len(figure.axes[0].texts) == (count if count <= 20 else 0)


def test_a_name_stands_in_the_middle_of_its_class(tmp_path, drawn_figures):
    coordinates = np.array([[0, 0], [1, 2], [9, 4], [5, 5.0]])
    labels = np.array([2, 2, 2, 0])
    functions.plot_scatter(tmp_path / "plot.png", coordinates, labels, ["a", "b", "c"], "title")
    texts = {text.get_text(): text.get_position() for text in drawn_figures[0].axes[0].texts}
    assert texts == {"a": (5, 5), "c": (1, 2)}  # no image is of class b


@pytest.mark.parametrize(("count", "channels", "views"), [(3, 3, 2), (30, 1, 4)])
def test_views_stand_beside_their_images_as_they_were(
    tmp_path, drawn_figures, count, channels, views
):
    shape = (count, channels, 6, 6)
    images = torch.randint(256, shape, generator=seeded(), dtype=torch.uint8)
    split = datasets.ImageData("", (), datasets.Split(images, None), None).with_statistics().train
    copies = torch.cat([images.flip(3) if v % 2 else images for v in range(views)])
    functions.plot_views(tmp_path / "plot.png", images, split.normalize(copies), split)
    (axes,) = drawn_figures[0].axes
    places = set()
    for picture in axes.images:
        left, right, bottom, top = picture.get_extent()
        place, number = int(left), int(top)  # the image is above its views; half are mirrored
        assert right - left == pytest.approx(0.9)
        assert bottom - top == pytest.approx(0.9)
        places.add((place, number))
        expected = images[place].flip(2) if number and number % 2 == 0 else images[place]
        expected = expected.permute(1, 2, 0).numpy() / 255
        shown = np.asarray(picture.get_array()).reshape(expected.shape)
        np.testing.assert_allclose(shown, expected, atol=1e-5)
    assert places == {(i, v) for i in range(min(10, count)) for v in range(1 + views)}
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["image", *(f"view {number}" for number in range(1, 1 + views))]


PLOTS = {
    "loss": lambda path: figures.plot_loss(path, history(5), "title"),
    "loss of one epoch": lambda path: figures.plot_loss(path, history(1), "title"),
    "both": lambda path: functions.plot_loss_and_accuracy(path, history(5), "title"),
    "both of one epoch": lambda path: functions.plot_loss_and_accuracy(path, history(1), "title"),
    "scatter 3": lambda path: scatter(path, 3),
    "scatter 14": lambda path: scatter(path, 14),
    "scatter 35": lambda path: scatter(path, 35),
    "scatter without labels": lambda path: scatter(path, 1, labelled=False),
    "per class 3": lambda path: per_class(path, 3),
    "per class 14": lambda path: per_class(path, 14),
    "confusion 3": lambda path: confusion(path, 3),
    "confusion 14": lambda path: confusion(path, 14),
    "confusion 70": lambda path: confusion(path, 70),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plot_writes_a_png_and_nothing_else(name, tmp_path):
    before = plt.get_fignums()
    PLOTS[name](tmp_path / "plot.png")
    assert plt.get_fignums() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        colors = [color for _, color in image.convert("RGB").getcolors(1 << 20)]
    assert max(max(color) - min(color) for color in colors) > 50  # more than axes and text


@pytest.mark.parametrize("count", [3, 10, 11, 40])
def test_classes_have_colors_of_their_own(count):
    assert len({to_hex(color) for color in figures.class_colors(count)}) == count


@pytest.mark.parametrize("count", [5, 12])
def test_scatter_shows_every_class_in_its_color(count, tmp_path):
    labels = np.arange(count).repeat(5)
    coordinates = np.stack((labels, np.zeros(len(labels))), 1)
    names = [f"name {i}" for i in range(count)]
    functions.plot_scatter(tmp_path / "plot.png", coordinates, labels, names, "title")
    with Image.open(tmp_path / "plot.png") as image:
        pixels = np.array([pixel for _, pixel in image.convert("RGB").getcolors(1 << 20)])
    for color in figures.class_colors(count):
        assert np.abs(pixels - 255 * np.array(to_rgb(color))).max(1).min() < 2
