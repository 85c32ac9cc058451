import copy
import math
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import functions


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def labels_of(count, classes, seed=0):
    return torch.randint(classes, (count,), generator=seeded(seed))


@pytest.fixture(scope="module")
def digits():
    data = functions.load_images("digits")
    return (
        functions.to_float(data.train.images).flatten(1),
        data.train.labels,
        functions.to_float(data.test.images).flatten(1),
        data.test.labels,
    )


def naive_knn(train, train_labels, test, test_labels, k, temperature):
    correct = 0
    for query, label in zip(test.double(), test_labels.tolist(), strict=True):
        cosine = [(F.cosine_similarity(query, x, dim=0).item(), i) for i, x in enumerate(train)]
        votes = {}
        for s, i in sorted(cosine, reverse=True)[:k]:
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


def test_knn_goes_through_all_test_images():
    # More than one chunk of 1,000.
    train = torch.eye(3)
    test_labels = labels_of(2500, 3)
    test = train[test_labels]
    wrong = torch.cat((test_labels[:2000], (test_labels[2000:] + 1) % 3))
    assert functions.knn_accuracy(train, torch.arange(3), test, test_labels, k=1) == 1
    assert functions.knn_accuracy(train, torch.arange(3), test, wrong, k=1) == 0.8


def test_probe_is_as_good_as_logistic_regression(digits):
    train, train_labels, test, test_labels = digits
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=500).fit(scaler.transform(train), train_labels)
    expected = model.score(scaler.transform(test), test_labels)
    result = functions.linear_probe(*digits, epochs=40, batch_size=128)
    assert result.accuracy > 0.9
    assert result.accuracy == pytest.approx(expected, abs=0.02)


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


def test_probe_weighs_a_smaller_last_batch_by_its_size():
    # Equal images of class 0: the first batch has loss log 2, then Adam's first step moves the
    # biases by the learning rate, here 1, towards class 0.
    inputs = torch.ones(17, 3), torch.zeros(17).long(), torch.ones(2, 3), torch.tensor([0, 1])
    row = functions.linear_probe(*inputs, epochs=1, learning_rate=1, batch_size=16).history[0]
    expected = (16 * math.log(2) + math.log(1 + math.exp(-2))) / 17
    assert row["train_loss"] == pytest.approx(expected, abs=1e-5)


def test_probe_repeats_itself_for_a_seed():
    inputs = normal(60, 20), labels_of(60, 3), normal(40, 20, seed=1), labels_of(40, 3, seed=1)
    first = functions.linear_probe(*inputs, epochs=3, batch_size=16, seed=1)
    torch.manual_seed(5)
    again = functions.linear_probe(*inputs, epochs=3, batch_size=16, seed=1)
    other = functions.linear_probe(*inputs, epochs=3, batch_size=16, seed=2)
    assert first.history == again.history
    assert torch.equal(first.predictions, again.predictions)
    assert first.history != other.history


def test_probe_does_not_train_on_the_test_set():
    train, labels = normal(60, 20), labels_of(60, 3)
    test, test_labels = normal(40, 20, seed=1), torch.arange(40) % 3
    first = functions.linear_probe(train, labels, test, test_labels, epochs=5)
    permuted = functions.linear_probe(train, labels, test, test_labels.roll(1), epochs=5)
    # Other test images: their statistics must not be used to standardise either.
    shifted = torch.cat((test[:10], 100 + 7 * test[10:]))
    moved = functions.linear_probe(train, labels, shifted, test_labels, epochs=5)
    assert torch.equal(first.predictions, permuted.predictions)
    assert torch.equal(first.predictions[:10], moved.predictions[:10])
    assert [row["test_loss"] for row in first.history] != [
        row["test_loss"] for row in permuted.history
    ]
    for row, other, another in zip(first.history, permuted.history, moved.history, strict=True):
        assert row["train_loss"] == other["train_loss"] == another["train_loss"]


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
    encoder = functions.SmallEncoder(1, 8)
    encoder.append(nn.Dropout(0.5))
    encoder(torch.rand(16, 1, 8, 8))  # running statistics other than the initial ones
    return encoder


def test_features_equal_a_manual_forward_in_eval_mode():
    encoder = drifting_encoder()
    images = torch.randint(256, (23, 1, 8, 8), generator=seeded(), dtype=torch.uint8)
    mean, std = torch.tensor([0.3]), torch.tensor([0.2])
    manual = copy.deepcopy(encoder).eval()
    expected = manual((images.double() / 255 - 0.3).div(0.2).float()).detach()
    plain = manual(images / 255).detach()
    for batch_size in (1, 4, 23, 500):
        result = functions.extract_features(encoder, images, mean, std, batch_size=batch_size)
        assert not result.requires_grad
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    result = functions.extract_features(encoder, images)
    torch.testing.assert_close(result, plain, rtol=0, atol=1e-5)


# Known mistake of public versions: the frozen encoder's BatchNorm statistics drift.
@pytest.mark.parametrize("training", [True, False])
def test_extraction_leaves_the_encoder_as_it_is(training):
    encoder = drifting_encoder().train(training)
    encoder[2].eval()  # one part in another mode than the whole
    before = copy.deepcopy(encoder.state_dict())
    modes = [module.training for module in encoder.modules()]
    functions.extract_features(encoder, torch.rand(20, 1, 8, 8, generator=seeded()), batch_size=6)
    assert [module.training for module in encoder.modules()] == modes
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


def test_extraction_restores_the_mode_after_an_error():
    encoder = drifting_encoder()
    with pytest.raises(RuntimeError):
        functions.extract_features(encoder, torch.rand(2, 5, 8, 8))
    assert encoder.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("size", [4, 64])
def test_embedding_std_of_a_full_sphere(size):
    z = normal(5000, size) * torch.linspace(0.1, 10, 5000)[:, None]
    assert functions.embedding_std(z) == pytest.approx(1 / math.sqrt(size), rel=0.02)


def test_embedding_std_of_a_collapse():
    direction = normal(1, 16)
    lengths = torch.linspace(0.1, 10, 50)[:, None]
    assert functions.embedding_std(direction * lengths) == pytest.approx(0, abs=1e-6)


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


def test_per_class_accuracy_leaves_out_a_class_without_images():
    matrix = functions.confusion_matrix(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]), 4)
    assert functions.per_class_accuracy(matrix, "abcd") == {"a": 0.5, "c": 1.0}


def test_few_label_draws_are_balanced_and_differ(monkeypatch):
    seen = []
    fit = LogisticRegression.fit

    def recording_fit(self, x, y, *args, **kwargs):
        seen.append((np.asarray(x), np.asarray(y)))
        return fit(self, x, y, *args, **kwargs)

    monkeypatch.setattr(LogisticRegression, "fit", recording_fit)
    labels, test_labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 3), labels_of(80, 3)
    centres = normal(3, 4)
    train, test = centres[labels] + normal(83, 4), centres[test_labels] + normal(80, 4, seed=1)
    mean, deviation = functions.few_label_accuracy(train, labels, test, test_labels, 5)
    assert len(seen) == 5
    for _, y in seen:
        assert np.bincount(y).tolist() == [5, 5, 3]
    assert len({x.tobytes() for x, _ in seen}) == 5
    assert deviation > 0
    # A seed fixes its draw, and the numbers are mean and sample deviation over the draws.
    scores = [
        functions.few_label_accuracy(train, labels, test, test_labels, 5, [seed, seed])[0]
        for seed in range(5)
    ]
    assert mean == pytest.approx(np.mean(scores))
    assert deviation == pytest.approx(np.std(scores, ddof=1))


def test_few_label_accuracy_of_perfect_features():
    labels, test_labels = labels_of(100, 5), labels_of(70, 5, seed=1)
    corners = torch.eye(5) * 10
    result = functions.few_label_accuracy(
        corners[labels], labels, corners[test_labels], test_labels, 2
    )
    assert result == (1.0, 0.0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_project_2d_repeats_itself(method, count):
    features = normal(count, 60)
    first = functions.project_2d(features, method, seed=1)
    np.random.seed(7)
    again = functions.project_2d(features, method, seed=1)
    assert first.shape == (count, 2)
    assert np.isfinite(first).all()
    assert first.std(0).min() > 0
    assert np.array_equal(first, again)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_project_2d_keeps_clusters_by_direction(method):
    # By direction, not by length: cosine distances.
    labels = torch.arange(45) % 3
    features = torch.eye(3, 8)[labels] + 0.05 * normal(45, 8)
    features *= torch.logspace(-2, 2, 45)[torch.randperm(45, generator=seeded())][:, None]
    result = functions.project_2d(features, method, seed=0)
    assert metrics.silhouette_score(result, labels) > 0.5


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (50, 0), (50, 7), (50, 49)])
def test_scheduled_rate_equals_torchs_cosine_after_a_linear_warmup(steps, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    cosine = CosineAnnealingLR(optimizer, steps - warmup)
    for step in range(steps):
        rate = functions.scheduled_rate(0.3, step, steps, warmup, "cosine")
        constant = functions.scheduled_rate(0.3, step, steps, warmup, "constant")
        if step < warmup:
            assert rate == constant == pytest.approx(0.3 * (step + 1) / warmup)
        else:
            assert rate == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
            assert constant == 0.3
            optimizer.step()
            cosine.step()


@pytest.mark.parametrize("shape", [(2500, 3, 3, 4), (7, 1, 8, 8)])
def test_channel_statistics_equal_numpy(shape):
    images = torch.randint(256, shape, generator=seeded(), dtype=torch.uint8)
    images[: len(images) // 4] //= 3  # not the same in every chunk
    images[:, -1] //= 2
    before = images.clone()
    mean, std = functions.channel_statistics(images)
    values = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-5)
    assert torch.equal(images, before)


def numbered_split(counts=(100, 60, 40)):
    """The images of a class one after the other, each image filled with its position."""
    images = torch.arange(sum(counts), dtype=torch.uint8)[:, None, None, None]
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return functions.Split(images.repeat(1, 1, 2, 2), labels)


def test_hold_out_is_a_stratified_partition():
    split = numbered_split()
    parts = functions.hold_out(split, 0.25)
    positions = [part.images[:, 0, 0, 0].long() for part in parts]
    assert sorted(torch.cat(positions).tolist()) == list(range(200))
    assert parts[0].labels.bincount().tolist() == [75, 45, 30]
    assert parts[1].labels.bincount().tolist() == [25, 15, 10]
    for part, position in zip(parts, positions, strict=True):
        assert torch.equal(part.labels, split.labels[position])


def test_hold_out_is_fixed_by_its_seed():
    split = numbered_split()
    first = functions.hold_out(split, 0.25)[1].images
    np.random.seed(3)
    assert torch.equal(functions.hold_out(split, 0.25)[1].images, first)
    assert not torch.equal(functions.hold_out(split, 0.25, seed=1)[1].images, first)
    assert functions.hold_out(functions.Split(split.images, None), 0.25)[1].labels is None


def test_hold_out_shares_no_memory():
    # Known mistake: what was done to the validation set was done to the training set, too.
    split = numbered_split((20, 20))
    parts = functions.hold_out(split, 0.25)
    for written, others in ((0, (parts[1], split)), (1, (parts[0], split))):
        before = [(other.images.clone(), other.labels.clone()) for other in others]
        parts[written].images.fill_(255)
        parts[written].labels.fill_(9)
        for other, (images, labels) in zip(others, before, strict=True):
            assert torch.equal(other.images, images)
            assert torch.equal(other.labels, labels)


def test_hold_out_refuses_a_class_of_one():
    split = functions.Split(torch.zeros(9, 1, 2, 2, dtype=torch.uint8), torch.tensor([0] * 8 + [1]))
    with pytest.raises(functions.UserError, match="too few images"):
        functions.hold_out(split, 0.25)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_epoch_loss_names_epoch_and_step(value):
    losses = functions.EpochLoss(5, 7, torch.device("cpu"))
    losses.add(torch.tensor(1.0))
    losses.add(torch.tensor(2.0))
    with pytest.raises(functions.Diverged, match=r"epoch 7, step 3\b"):
        losses.add(torch.tensor(value))


def test_epoch_loss_is_the_mean():
    losses = functions.EpochLoss(4, 1, torch.device("cpu"))
    for value in (1.0, 2.0, 3.0, 6.0):
        losses.add(torch.tensor(value))
    assert losses.mean() == pytest.approx(3)


def test_epoch_loss_keeps_no_graph():
    # A graph per step would fill the memory within an epoch.
    losses = functions.EpochLoss(4, 1, torch.device("cpu"))
    weight = torch.tensor(1.0, requires_grad=True)
    alive = weakref.ref(weight)
    losses.add(weight * 2)
    del weight
    assert alive() is None


@pytest.mark.parametrize(
    ("name", "stem", "channels", "image_size", "features"),
    [
        ("small", "cifar", 1, 28, 2048),
        ("small", "cifar", 3, 32, 2048),
        ("small", "cifar", 1, 8, 128),
        ("small", "cifar", 3, 20, 1152),
        ("resnet18", "cifar", 1, 8, 512),
        ("resnet18", "imagenet", 1, 64, 512),
        ("resnet34", "cifar", 3, 32, 512),
        ("resnet50", "cifar", 3, 32, 2048),
        ("resnet50", "imagenet", 3, 64, 2048),
    ],
)
def test_encoder_output_shape(name, stem, channels, image_size, features):
    with torch.device("meta"):  # shapes only, no arithmetic
        encoder = functions.make_encoder(name, stem, channels, image_size)
        output = encoder(torch.empty(2, channels, image_size, image_size))
    assert output.shape == (2, features)
    assert encoder.num_features == features


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_narrow_resnet_has_a_part_of_the_channels(name, stem):
    with torch.device("meta"):
        narrow = functions.make_encoder(name, stem, 3, 32, 24)
        whole = getattr(torchvision.models, name)(weights=None)
        output = narrow(torch.empty(2, 3, 32, 32))
    assert output.shape == (2, narrow.num_features) == (2, whole.fc.in_features * 24 // 64)
    whole.fc = nn.Identity()
    shapes = {key: tuple(value.shape) for key, value in narrow.state_dict().items()}
    for key, value in whole.state_dict().items():
        first, *rest = value.shape or (0,)
        expected = [first * 24 // 64, *rest]
        if key == "conv1.weight" and stem == "cifar":
            expected[2:] = [3, 3]
        elif len(rest) == 3 and key != "conv1.weight":
            expected[1] = rest[0] * 24 // 64
        assert shapes.pop(key) == (tuple(expected) if value.shape else ())
    assert not shapes


@pytest.mark.parametrize(("stem", "parameters"), [("cifar", 11_168_832), ("imagenet", 11_176_512)])
def test_resnet18_is_torchvisions(stem, parameters):
    encoder = functions.make_encoder("resnet18", stem, 3, 32)
    with torch.device("meta"):
        reference = torchvision.models.resnet18(weights=None)
        if stem == "cifar":  # SimCLR, appendix B.9
            reference.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    reference.fc = nn.Identity()
    if stem == "cifar":
        reference.maxpool = nn.Identity()
    reference.load_state_dict(encoder.state_dict(), strict=True, assign=True)
    images = normal(2, 3, 32, 32)
    torch.testing.assert_close(encoder.eval()(images), reference.eval()(images))
    assert functions.count_parameters(encoder) == parameters
    encoder.conv1.requires_grad_(False)
    assert functions.count_parameters(encoder) == parameters - encoder.conv1.weight.numel()


@pytest.mark.parametrize(
    ("size", "stride"),
    [(1, 1), (1, 2), (2, 2), (2, 1), (3, 2), (4, 2), (3, 1), (5, 2), (7, 2), (4, 1)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_on_a_small_map_is_torchs(size, stride, layout, kernel):
    channels = 512 if (size, stride) == (4, 1) else 4
    reference = nn.Conv2d(channels, 6, kernel, stride, kernel // 2, dtype=torch.float64)
    reference = reference.to(memory_format=layout)
    ours = copy.deepcopy(reference)
    ours.__class__ = functions.SmallMapConv2d
    images = normal(7, channels, size, size).double().to(memory_format=layout)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((ours, reference), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# oneDNN's bfloat16 weight gradient for 1x1 maps at stride 2 held uninitialised memory.
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_resnet_gradients_on_tiny_images_repeat(precision):
    torch.manual_seed(0)
    encoder = functions.make_encoder("resnet18", "imagenet", 1, 8)
    encoder = encoder.to(memory_format=torch.channels_last)
    images = normal(64, 1, 8, 8)
    first = None
    for _ in range(4):
        junk = [torch.full((2**k,), math.nan) for k in range(4, 23)]
        del junk  # memory that is handed out again
        encoder.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
            loss = encoder(images).square().mean()
        loss.backward()
        gradients = [p.grad.clone() for p in encoder.parameters()]
        first = first or gradients
        for a, b in zip(first, gradients, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()


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


def test_cells_of_the_confusion_matrix_that_round_to_0_are_empty(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(functions, "save_figure", lambda figure, path: figures.append(figure))
    matrix = torch.tensor([[995, 5, 0], [0, 994, 6], [300, 0, 700]])
    functions.plot_confusion_matrix(tmp_path / "plot.png", matrix, ["a", "b", "c"], "title")
    cells = {text.get_position()[::-1]: text.get_text() for text in figures[0].axes[0].texts}
    assert cells == {(0, 0): "100", (1, 1): "99", (1, 2): "1", (2, 0): "30", (2, 2): "70"}


PLOTS = {
    "loss": lambda path: functions.plot_loss(path, history(5), "title"),
    "loss of one epoch": lambda path: functions.plot_loss(path, history(1), "title"),
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
    assert len({to_hex(color) for color in functions.class_colors(count)}) == count


@pytest.mark.parametrize("count", [5, 12])
def test_scatter_shows_every_class_in_its_color(count, tmp_path):
    labels = np.arange(count).repeat(5)
    coordinates = np.stack((labels, np.zeros(len(labels))), 1)
    names = [f"name {i}" for i in range(count)]
    functions.plot_scatter(tmp_path / "plot.png", coordinates, labels, names, "title")
    with Image.open(tmp_path / "plot.png") as image:
        pixels = np.array([pixel for _, pixel in image.convert("RGB").getcolors(1 << 20)])
    for color in functions.class_colors(count):
        assert np.abs(pixels - 255 * np.array(to_rgb(color))).max(1).min() < 2
