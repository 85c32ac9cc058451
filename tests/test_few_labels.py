import csv
import dataclasses
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

import few_labels
import functions
import simsiam
from support import datasets, devices, pretraining, supervised

METHODS = ("supervised", "supervised-tuned", "linear", "mlp", "finetuned")


@pytest.fixture(scope="module")
def fabric():
    return devices.make_fabric("cpu", "float32")


def labels_of(*counts):
    """Shuffled labels with so many of each class."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def noise_data(*counts):
    """Images that differ from each other, with labels that say nothing about them."""
    labels = labels_of(*counts)
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (len(labels) + 60, 1, 8, 8), dtype=torch.uint8, generator=draw)
    train = datasets.Split(images[:-60], labels)
    test = datasets.Split(images[-60:], torch.arange(60) % len(counts))
    return datasets.ImageData("noise", tuple("abcdefghij"[: len(counts)]), train, test).measured()


def digits(train, test):
    whole = functions.load_images("digits")
    parts = {"train": train, "test": test}
    parts = {k: getattr(whole, k).select(torch.arange(n)) for k, n in parts.items()}
    return dataclasses.replace(whole, **parts).measured()


def settings(**changes):
    return simsiam.Config(**{"label_seeds": 2, "label_steps": 12, "device": "cpu", **changes})


def pretrained(seed=0):
    """A model whose weights and BatchNorm statistics are no fresh encoder's."""
    torch.manual_seed(100 + seed)
    model = simsiam.SimSiam(simsiam.Config(), 1, 8)
    with torch.no_grad():
        model.train()(torch.randn(64, 1, 8, 8) * 2 + 1)
    return model


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read(folder):
    return list(csv.DictReader((folder / "label_efficiency.csv").open()))


def without_seconds(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read(folder)]


# ------------------------------------------------------------------------- labelled images


@pytest.mark.parametrize("count", [1, 7, 30, 59, 60])
def test_drawn_labels_are_balanced_nested_and_without_repeats(count):
    labels = labels_of(20, 20, 20)
    for seed in range(5):
        chosen = few_labels.draw_labels(labels, count, seed)
        counts = labels[chosen].bincount(minlength=3)
        assert len(chosen.unique()) == len(chosen) == count
        assert counts.max() - counts.min() <= 1
        for more in range(count, 61, 9):
            assert torch.equal(few_labels.draw_labels(labels, more, seed)[:count], chosen)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [((2, 50, 50), 60, [2, 29, 29]), ((2, 50, 9), 61, [2, 50, 9]), ((1, 1, 40), 12, [1, 1, 10])],
)
def test_small_classes_give_all_they_have(sizes, count, expected):
    labels = labels_of(*sizes)
    chosen = few_labels.draw_labels(labels, count, 3)
    assert len(chosen.unique()) == count
    assert labels[chosen].bincount(minlength=3).tolist() == expected


def test_seeds_draw_other_images_each_as_often_as_any_other():
    labels = labels_of(6, 6, 6)
    draws = [few_labels.draw_labels(labels, 5, seed) for seed in range(600)]
    assert torch.equal(draws[0], few_labels.draw_labels(labels, 5, 0))
    counts = torch.cat(draws).bincount(minlength=18)  # 600 * 5 / 18 = 167, sd below 12.3
    assert (counts - 600 * 5 / 18).abs().max() < 4 * 12.3


# ------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def study(tmp_path_factory, fabric):
    """A study of 20 and all 150 labels by two seeds, with the predictions it was made from."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study")
    data, model, predictions = digits(150, 80), pretrained(), {}
    predict = few_labels.Study.predict

    def spy(self, method, chosen, seed):
        predictions[len(chosen), seed, method] = predict(self, method, chosen, seed)
        return predictions[len(chosen), seed, method].clone()

    before = copy_of(model)
    config = settings(labels="all,20,5000")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_labels.Study, "predict", spy)
        summary = few_labels.study_stage(model, data, config, folder, fabric)
    return SimpleNamespace(
        folder=folder,
        data=data,
        model=model,
        config=config,
        before=before,
        summary=summary["label_efficiency"],
        predictions=predictions,
    )


def test_a_row_for_each_training_with_sklearns_scores(study):
    rows = read(study.folder)
    keys = [(int(row["labels"]), int(row["seed"]), row["method"]) for row in rows]
    wanted = [(n, s, m) for n in (20, 150) for s in (0, 1) for m in METHODS]  # 5000 are too many
    assert sorted(keys) == sorted(wanted)
    truth = study.data.test.labels.numpy()
    for key, row in zip(keys, rows, strict=True):
        predicted = study.predictions[key].numpy()
        assert float(row["accuracy"]) == pytest.approx(accuracy_score(truth, predicted))
        assert float(row["macro_f1"]) == pytest.approx(f1_score(truth, predicted, average="macro"))
        assert row["steps"] == "12"
        assert float(row["seconds"]) > 0
    assert len({row["accuracy"] for row in rows}) > 10


def test_the_summary_is_mean_and_deviation_of_the_rows(study):
    assert list(study.summary) == list(METHODS)
    for method, table in study.summary.items():
        assert list(table) == ["20", "150"]
        for count, cell in table.items():
            rows = [r for r in read(study.folder) if (r["method"], r["labels"]) == (method, count)]
            for name in ("accuracy", "macro_f1"):
                values = [float(row[name]) for row in rows]
                assert cell[name] == pytest.approx(statistics.mean(values))
                assert cell[f"{name}_sd"] == pytest.approx(statistics.stdev(values))


def test_the_encoder_is_left_bit_identical(study):
    assert same(study.model.state_dict(), study.before)
    assert all(p.requires_grad and p.grad is None for p in study.model.parameters())


def test_an_interrupted_study_goes_on_without_repeating(study, tmp_path, fabric, monkeypatch):
    predict, calls = few_labels.Study.predict, []

    def stopping(self, method, chosen, seed):
        calls.append((len(chosen), seed, method))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return predict(self, method, chosen, seed)

    monkeypatch.setattr(few_labels.Study, "predict", stopping)
    arguments = (study.model, study.data, study.config, tmp_path, fabric)
    with pytest.raises(KeyboardInterrupt):
        few_labels.study_stage(*arguments)
    assert without_seconds(tmp_path) == without_seconds(study.folder)[:7]
    assert few_labels.study_stage(*arguments)["label_efficiency"] == study.summary
    assert without_seconds(tmp_path) == without_seconds(study.folder)
    assert len(calls) == 8 + 20 - 7
    few_labels.study_stage(*arguments)
    assert len(calls) == 8 + 20 - 7


def test_other_steps_and_more_seeds_are_rows_of_their_own(study, tmp_path, fabric, monkeypatch):
    calls = []

    def predict(self, method, chosen, seed):
        calls.append((len(chosen), seed, method))
        return self.data.test.labels

    monkeypatch.setattr(few_labels.Study, "predict", predict)
    old = (study.folder / "label_efficiency.csv").read_bytes()
    (tmp_path / "label_efficiency.csv").write_bytes(old)
    config = dataclasses.replace(study.config, labels="20", label_seeds=3)
    summary = few_labels.study_stage(study.model, study.data, config, tmp_path, fabric)
    assert calls == [(20, 2, method) for method in METHODS]
    accuracy = [float(r["accuracy"]) for r in read(tmp_path) if r["labels"] == "20"]
    mean = summary["label_efficiency"]["mlp"]["20"]["accuracy"]
    assert mean == pytest.approx(statistics.mean(accuracy[METHODS.index("mlp") :: 5]))
    config = dataclasses.replace(study.config, labels="20")
    fewer = few_labels.study_stage(study.model, study.data, config, tmp_path, fabric)
    assert {m: t["20"] for m, t in study.summary.items()} == {
        m: t["20"] for m, t in fewer["label_efficiency"].items()
    }
    config = dataclasses.replace(study.config, labels="20", label_steps=5)
    summary = few_labels.study_stage(study.model, study.data, config, tmp_path, fabric)
    assert len(calls) == 5 + 10
    assert summary["label_efficiency"]["mlp"]["20"] == {
        "accuracy": 1.0,
        "accuracy_sd": 0.0,
        "macro_f1": 1.0,
        "macro_f1_sd": 0.0,
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace(b"macro_f1", b"f1", 1),
        lambda text: text[: text.rindex(b",mlp") + 4],
        lambda text: text.replace(b"20,0,12", b"20,zero,12", 1),
        lambda text: bytes(range(256)),
    ],
)
def test_a_damaged_table_is_named(study, tmp_path, fabric, user_error, monkeypatch, spoil):
    monkeypatch.setattr(few_labels.Study, "predict", lambda self, *_: self.data.test.labels)
    path = tmp_path / "label_efficiency.csv"
    content = spoil((study.folder / "label_efficiency.csv").read_bytes())
    path.write_bytes(content)
    arguments = (study.model, study.data, study.config, tmp_path, fabric)
    with user_error(path, "damaged", "delete it"):
        few_labels.study_stage(*arguments)
    assert path.read_bytes() == content


# ----------------------------------------------------------------------------- the methods


class Trainings:
    """Watches the study's trainings: what they are given, start from, and look at meanwhile."""

    def __init__(self, monkeypatch):
        self.train, self.extract = supervised.train_classifier, functions.extract_features
        self.running, self.looked_at = False, []
        self.held_out, self.held_out_losses = None, []
        monkeypatch.setattr(supervised, "train_classifier", self.spy)
        monkeypatch.setattr(functions, "extract_features", self.extract_spy)

    def spy(self, classifier, optimizer, inputs, labels, prepare, *rest, **named):
        self.classifier, self.optimizer, self.inputs = classifier, optimizer, inputs
        self.labels, self.prepare, self.first = labels, prepare, copy_of(classifier)
        self.running = True
        for row in self.train(classifier, optimizer, inputs, labels, prepare, *rest, **named):
            if self.held_out is not None:
                self.held_out_losses.append(self.loss(classifier))
            yield row
        self.running = False

    def extract_spy(self, encoder, split, *rest, **named):
        if self.running:
            self.looked_at.append(split.images)
        return self.extract(encoder, split, *rest, **named)

    def loss(self, classifier):
        images, labels, train = self.held_out
        with functions.evaluating(classifier):
            return F.cross_entropy(classifier(normalized(images, train)), labels).item()


def normalized(images, train):
    """Images less the mean over their deviation, both of the training images."""
    pixels = train.images.numpy() / 255
    return ((images / 255 - pixels.mean()) / pixels.std()).to(torch.float32)


@pytest.fixture
def trainings(monkeypatch):
    return Trainings(monkeypatch)


def rows_of(images):
    return {tuple(image.flatten().tolist()) for image in images}


@pytest.mark.parametrize("method", ["linear", "mlp"])
def test_frozen_methods_train_a_head_on_the_encoders_features(fabric, trainings, method):
    data, model = digits(150, 40), pretrained()
    study = few_labels.Study(model.encoder, data, settings(), fabric)
    chosen = few_labels.draw_labels(data.train.labels, 40, 0)
    predictions = study.predict(method, chosen, 0)
    with functions.evaluating(model):
        train, test = (
            model.encoder(normalized(split.images, data.train)) for split in (data.train, data.test)
        )
    centre, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    expected, alive = ((train - centre) / spread)[chosen], spread > 1e-2
    assert trainings.inputs.shape == expected.shape
    torch.testing.assert_close(trainings.inputs[:, alive], expected[:, alive], rtol=1e-3, atol=1e-3)
    assert torch.equal(trainings.labels, data.train.labels[chosen])
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (method == "mlp")
    assert [type(layer) for layer in trainings.classifier] == [*hidden, nn.Linear]
    with functions.evaluating(trainings.classifier):
        logits = trainings.classifier((test - centre) / spread)
    assert (logits.argmax(1) == predictions).float().mean() > 0.97


@pytest.mark.parametrize("method", ["supervised", "supervised-tuned", "finetuned"])
def test_methods_that_train_an_encoder_start_where_they_should(fabric, trainings, method):
    data, model = noise_data(30, 30, 30), pretrained()
    before = copy_of(model)
    study = few_labels.Study(model.encoder, data, settings(), fabric)
    study.predict(method, few_labels.draw_labels(data.train.labels, 20, 0), 0)
    encoder = copy_of(model.encoder)
    start = {k[2:]: v for k, v in trainings.first.items() if k.startswith("0.")}
    end = copy_of(trainings.classifier[0])
    assert start.keys() == encoder.keys()
    assert same(start, encoder) == (method == "finetuned")
    assert not any(torch.equal(end[k], start[k]) for k in end if k.endswith("weight"))
    assert same(model.state_dict(), before)
    assert trainings.classifier[1].out_features == 3
    assert len(rows_of(trainings.inputs)) == 20
    generator = torch.Generator().manual_seed(0)
    prepared, views = trainings.prepare(trainings.inputs, generator), trainings.inputs
    if method != "supervised":  # mild crops and flips
        mild = simsiam.Config(crop_scale_min=0.8)
        views = 255 * pretraining.crop_views(
            views, mild, torch.Generator().manual_seed(0), crop_only=True
        )
    torch.testing.assert_close(prepared, normalized(views, data.train), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "count", "held"),
    [("supervised-tuned", 35, 3), ("finetuned", 30, 3), ("supervised-tuned", 90, 9)],
)
def test_selection_is_on_a_tenth_of_each_class(fabric, trainings, method, count, held):
    data, model = noise_data(30, 30, 30), pretrained()
    study = few_labels.Study(model.encoder, data, settings(), fabric)
    chosen = few_labels.draw_labels(data.train.labels, count, 0)
    study.predict(method, chosen, 0)
    labelled, fitted = rows_of(data.train.images[chosen]), rows_of(trainings.inputs)
    (held_out,) = {frozenset(rows_of(images)) for images in trainings.looked_at}
    assert len(held_out) == held
    assert len(fitted) == count - held
    assert held_out | fitted == labelled  # all used, and none of another image or of the test set
    of = {
        tuple(x.flatten().tolist()): y.item()
        for x, y in zip(data.train.images, data.train.labels, strict=True)
    }
    counts = np.bincount([of[row] for row in held_out], minlength=3)
    assert counts.tolist() == [held // 3] * 3


def test_selection_is_on_every_class_of_unequal_ones(fabric, trainings):
    data = noise_data(30, 30, 300)
    study = few_labels.Study(pretrained().encoder, data, settings(label_steps=1), fabric)
    study.predict("finetuned", few_labels.draw_labels(data.train.labels, 360, 0), 0)
    held_out = rows_of(trainings.looked_at[0])
    images = zip(data.train.images, data.train.labels, strict=True)
    classes = {y.item() for x, y in images if tuple(x.flatten().tolist()) in held_out}
    assert classes == {0, 1, 2}


@pytest.mark.parametrize(
    ("method", "count"), [("supervised", 90), ("linear", 90), ("mlp", 90), ("finetuned", 27)]
)
def test_nothing_is_held_out_without_selection_or_with_few_labels(fabric, trainings, method, count):
    data = noise_data(30, 30, 30)
    study = few_labels.Study(pretrained().encoder, data, settings(), fabric)
    study.predict(method, few_labels.draw_labels(data.train.labels, count, 0), 0)
    assert len(trainings.inputs) == count
    assert trainings.looked_at == []


@pytest.mark.parametrize(("steps", "every"), [(20, 1), (50, 3)])
def test_the_weights_with_the_lowest_held_out_loss_are_kept(
    fabric, trainings, monkeypatch, steps, every
):
    monkeypatch.setattr(few_labels, "crop_views", lambda images, *_, **__: images / 255)
    data = noise_data(30, 30, 30)  # nothing to learn: the loss on other images rises
    study = few_labels.Study(pretrained().encoder, data, settings(label_steps=steps), fabric)
    chosen = few_labels.draw_labels(data.train.labels, 90, 0)
    held = chosen[-9:]
    trainings.held_out = (data.train.images[held], data.train.labels[held], data.train)
    study.predict("supervised-tuned", chosen, 0)
    assert len(trainings.held_out_losses) == steps  # all in one batch: a step per epoch
    losses = trainings.held_out_losses[every - 1 :: every]
    assert min(losses) < losses[-1] - 1e-3
    assert trainings.loss(trainings.classifier) == pytest.approx(min(losses), abs=1e-5)


RATES = {"supervised": (1e-3, 0.0), "finetuned": (3e-4, 0.01)}  # the plain one has no decay


@pytest.mark.parametrize("method", METHODS)
def test_rates_and_weight_decay_are_those_of_the_method(fabric, trainings, method):
    data = noise_data(10, 10, 10)
    study = few_labels.Study(pretrained().encoder, data, settings(label_steps=1), fabric)
    study.predict(method, few_labels.draw_labels(data.train.labels, 20, 0), 0)
    (group,) = trainings.optimizer.param_groups
    assert type(trainings.optimizer) is torch.optim.AdamW
    rate, decay = RATES.get(method, (1e-3, 0.01))
    assert trainings.optimizer.defaults["lr"] == rate
    assert group["weight_decay"] == decay
    assert len(group["params"]) == len(list(trainings.classifier.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_the_test_images_change_nothing_in_the_training(fabric, trainings, method):
    data, trained = noise_data(30, 30, 30), []
    other = datasets.Split(data.test.images.flip(0) // 3, data.test.labels.flip(0))
    other = other.normalized_as(data.train)
    chosen = few_labels.draw_labels(data.train.labels, 60, 1)
    for test in (data.test, other):
        changed = dataclasses.replace(data, test=test)
        study = few_labels.Study(pretrained().encoder, changed, settings(), fabric)
        predictions = study.predict(method, chosen, 1)
        trained.append(copy_of(trainings.classifier))
        assert predictions.shape == (60,)
    assert same(*trained)
