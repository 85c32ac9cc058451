import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import moco
import simclr
import simsiam
from support import pretraining, verdict

ROOT = Path(simclr.__file__).resolve().parent
NT_XENT = verdict.Method(chance_loss=math.log(2 * 64 - 1), temperature=0.5)
SIMSIAM = verdict.Method(chance_loss=0.0, collapse_loss=-1.0)
ABOUT = verdict.Circumstances(
    epochs=20, warmup_epochs=0, embeddings=128, size=128, normalised=128, knn_chance=0.2
)
SPREAD = 1 / math.sqrt(128)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------- the measures


def pairs_apart(z):
    """All squared distances between rows, one by one."""
    z = [row / row.norm() for row in z.double()]
    return [(z[i] - z[j]).square().sum().item() for i in range(len(z)) for j in range(i)]


def test_alignment_is_the_mean_over_all_pairs_of_views():
    z = normal(3 * 5, 7)  # three views of five images
    by_image = [pairs_apart(z[image::5]) for image in range(5)]
    expected = sum(map(sum, by_image)) / 15
    assert verdict.measure(z, 3, None)["alignment"] == pytest.approx(expected, rel=1e-5)
    assert verdict.measure(z[:5].repeat(3, 1), 3, None)["alignment"] == 0


def test_uniformity_equals_a_double_loop():
    z = normal(2 * 9, 6)
    potentials = [math.exp(-2 * distance) for distance in pairs_apart(z[:9])]
    expected = math.log(sum(potentials) / len(potentials))
    assert verdict.measure(z, 2, None)["uniformity"] == pytest.approx(expected, rel=1e-5)
    # The corners of a cross are sqrt(2) apart, opposite ones 2.
    cross = torch.cat([torch.eye(3), -torch.eye(3)])
    expected = math.log((12 * math.exp(-4) + 3 * math.exp(-8)) / 15)
    assert verdict.uniformity(cross) == pytest.approx(expected, rel=1e-5)
    assert verdict.uniformity(torch.ones(4, 3)) == 0


class OnAppleGpu(torch.Tensor):
    """As on one: there is no pdist."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.pdist:
            raise NotImplementedError("aten::_pdist_forward is not implemented for the MPS device")
        result = super().__torch_function__(function, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


def test_uniformity_is_known_on_an_apple_gpu():
    z = normal(9, 6)
    assert verdict.uniformity(z.as_subclass(OnAppleGpu)) == verdict.uniformity(z)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_image_share_is_that_of_the_variance(share):
    image, noise = normal(1, 4000, 64), normal(3, 4000, 64).flip(2)
    z = (image * math.sqrt(share) + noise * math.sqrt(1 - share)).flatten(0, 1)
    assert verdict.measure(z, 3, None)["image_share"] == pytest.approx(share, abs=0.02)


def test_views_are_compared_pixel_by_pixel():
    images = normal(8, 3, 6, 6)
    other = normal(8, 3, 6, 6).roll(1, 0)
    assert verdict.view_correlation(images, 0.3 * images + 2) == pytest.approx(1)
    assert verdict.view_correlation(images, images.flip(3)) == pytest.approx(1)
    assert abs(verdict.view_correlation(images, images.flip(2))) < 0.5
    assert abs(verdict.view_correlation(images, other)) < 0.5
    grey = normal(8, 1, 1, 1).expand(8, 3, 6, 6)
    assert verdict.view_correlation(grey, grey + 1) == 1  # without contrast there is no crop


def test_luck_is_rarely_exceeded():
    labels = torch.tensor([0] * 60 + [1] * 40)
    rarely = verdict.chance_accuracy(labels, 200)
    right = torch.distributions.Binomial(200, torch.tensor(0.6)).sample((20_000,)) / 200
    assert 0 < (right > rarely).float().mean().item() < 0.004
    assert verdict.chance_accuracy(None, 200) == 0


@pytest.fixture
def methods(monkeypatch):
    """What a script says of its method: `main` stops there."""
    said = []

    class Stop(Exception):
        pass

    def take(model, optimizer, train, config, run, fabric, monitor, method, views=2):
        said.append((method, views))
        raise Stop

    def start(script, config):
        with pytest.raises(Stop):
            script.main(config)
        return said[-1]

    monkeypatch.setattr(pretraining, "Pretraining", take)
    return start


@pytest.mark.parametrize(("views", "decoupled"), [(2, False), (4, False), (2, True), (4, True)])
def test_the_loss_of_equal_embeddings_is_what_simclr_says(tmp_path, methods, views, decoupled):
    loss = "dcl" if decoupled else "nt-xent"
    config = digits(simclr, tmp_path, views=views, loss=loss, batch_size=16)
    method, count = methods(simclr, config)
    equal = simclr.nt_xent_loss(
        torch.ones(views * 16, 8), config.temperature, views=views, decoupled=decoupled
    )
    assert method.chance_loss == pytest.approx(equal.item(), rel=1e-5)
    assert (method.temperature, count) == (config.temperature, views)


def test_the_loss_of_equal_embeddings_is_what_moco_says(tmp_path, methods):
    config = digits(moco, tmp_path, batch_size=16, queue_size=48, temperature=0.3)
    method, count = methods(moco, config)
    one = F.normalize(torch.ones(1, 8), dim=1)
    equal = moco.info_nce_loss(one.expand(16, 8), one.expand(16, 8), one.expand(48, 8), 0.3)
    assert method.chance_loss == pytest.approx(equal.item(), rel=1e-5)
    assert (method.temperature, count) == (0.3, 1)


# -------------------------------------------------------------------------------- the verdict


def row(epoch=5, **changes):
    """An epoch of a run in which nothing is wrong."""
    values = {"epoch": epoch, "loss": -0.5, "last_loss": -0.49, "embedding_std": SPREAD}
    values |= {"rank_me": 40.0, "alignment": 1.0, "image_share": 0.5, "view_correlation": 0.5}
    return values | changes


CASES = [
    ("good", SIMSIAM, {}, {}),
    ("good", NT_XENT, {"loss": 4.84}, {}),
    ("chance", NT_XENT, {"loss": 4.85}, {}),
    ("good", NT_XENT, {"loss": 4.85}, {"warmup_epochs": 5}),
    ("good", NT_XENT, {"loss": 4.85, "epoch": 1}, {}),
    ("collapse", NT_XENT, {"embedding_std": 0.09 * SPREAD}, {}),
    ("good", NT_XENT, {"embedding_std": 0.11 * SPREAD}, {}),
    ("collapse", SIMSIAM, {"embedding_std": 0.86 * SPREAD}, {}),
    ("good", SIMSIAM, {"embedding_std": 0.87 * SPREAD}, {}),
    ("collapse", SIMSIAM, {"loss": -0.995, "epoch": 2}, {}),
    ("good", SIMSIAM, {"loss": -0.995, "epoch": 3}, {}),
    ("equal views", SIMSIAM, {"image_share": 1.0, "view_correlation": 1.0}, {}),
    ("good", SIMSIAM, {"image_share": 0.9999}, {}),
    ("no crop", NT_XENT, {"view_correlation": 0.96}, {}),
    ("no predictor", SIMSIAM, {"last_loss": -0.5 + 1e-6}, {}),
    ("good", NT_XENT, {"last_loss": -0.5}, {}),
    ("low rank", NT_XENT, {"rank_me": 9.0}, {}),
    ("good", NT_XENT, {"rank_me": 9.0}, {"embeddings": 32}),
    ("labels", NT_XENT, {"knn_held_out": 0.15}, {}),
    ("good", NT_XENT, {"knn_held_out": 0.25}, {}),
    ("good", NT_XENT, {"knn_held_out": 1.0}, {"knn_chance": 1.0}),  # a single class
    ("small batch", NT_XENT, {}, {"normalised": 8}),
    ("good", NT_XENT, {}, {"normalised": 10}),
    ("frozen BatchNorm", SIMSIAM, {"embedding_std": 0.0}, {"frozen": True}),
    ("constant images", SIMSIAM, {"embedding_std": 0.0}, {"constant": True}),
]


@pytest.mark.parametrize(("expected", "method", "columns", "about"), CASES)
def test_the_most_likely_cause_is_named(expected, method, columns, about):
    history = [row(epoch=0), row(**columns)]
    assert verdict.judge(history, method, dataclasses.replace(ABOUT, **about)) == expected
    light = verdict.describe(expected).partition(":")[0]
    assert light == (expected if expected == "good" else verdict.CAUSES[expected][0])


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (0.001, "low temperature"),
        (0.05, "good"),
        (0.5, "good"),
        (10.0, "good"),
        (100.0, "high temperature"),
    ],
)
def test_a_temperature_at_which_the_softmax_is_one_term_or_flat(temperature, expected):
    method = dataclasses.replace(NT_XENT, temperature=temperature)
    assert verdict.judge([row()], method, ABOUT) == expected
    similarities = F.normalize(normal(128, 128), dim=1)
    similarities = (similarities @ similarities.T)[~torch.eye(128, dtype=torch.bool)].view(128, 127)
    weights = (similarities / temperature).softmax(1)
    strongest = weights.amax(1).mean().item()
    assert (strongest > 0.5) == (expected == "low temperature")
    nearest, farthest = (torch.tensor([1.0, -1.0]) / temperature).softmax(0).tolist()
    assert (nearest < 1.1 * farthest) == (expected == "high temperature")


@pytest.mark.parametrize("size", [32, 128, 2048])
def test_a_temperature_is_too_low_where_a_softmax_of_random_embeddings_freezes(size):
    # The largest of n normal similarities is near sqrt(2 log n / D). The weights freeze where the
    # sum over all would be at its most at a similarity of 1 / (D t), beyond that largest one.
    limit = 1 / (size * math.sqrt(2 * math.log(127) / size))
    for factor, expected in ((0.99, "low temperature"), (1.01, "good")):
        method = dataclasses.replace(NT_XENT, temperature=factor * limit)
        about = dataclasses.replace(ABOUT, size=size)
        history = [row(embedding_std=1 / math.sqrt(size))]
        assert verdict.judge(history, method, about) == expected


@pytest.mark.parametrize(("accuracies", "expected"), [((0.5, 0.1), "labels"), ((0.1, 0.5), "good")])
def test_the_last_knn_check_counts(accuracies, expected):
    history = [row(epoch, knn_held_out=a) for epoch, a in enumerate(accuracies, 4)]
    assert verdict.judge([*history, row(6)], NT_XENT, ABOUT) == expected


def test_views_are_compared_in_grey_and_in_the_median():
    images = normal(9, 3, 6, 6)
    assert verdict.view_correlation(images, images.flip(1)) == pytest.approx(1)
    most = torch.cat([images[:5], normal(4, 3, 6, 6).roll(1, 3)])
    assert verdict.view_correlation(images, most) == pytest.approx(1)


@pytest.mark.parametrize(("head", "passes"), [("original", 1), ("paper", 2)])
def test_simsiam_says_how_many_passes_its_views_take(tmp_path, methods, head, passes):
    method, views = methods(simsiam, digits(simsiam, tmp_path, head=head))
    assert (method, views) == (verdict.Method(0.0, -1.0, passes=passes), 2)


# ----------------------------------------------------------------------------------- whole runs


def digits(script, folder, **changes):
    settings = {"dataset": "digits", "encoder": "small", "batch_size": 64, "epochs": 3}
    settings |= {"stages": "pretrain", "device": "cpu", "precision": "float32", "knn_every": 0}
    return script.Config(**settings | changes, output_dir=str(folder), name="run")


def test_simsiam_without_its_stop_gradient_is_found(tmp_path, monkeypatch, capsys):
    def loss(p, z):
        return -F.cosine_similarity(p, z, dim=1).mean()

    monkeypatch.setattr(simsiam, "negative_cosine_similarity", loss)
    summary = simsiam.main(digits(simsiam, tmp_path, epochs=5, schedule="constant"))
    assert summary["verdict"].startswith("bad: the embedding collapses; ")
    folder = tmp_path / "simsiam" / "run"
    assert json.loads((folder / "summary.json").read_text())["verdict"] == summary["verdict"]
    printed = capsys.readouterr().out
    assert printed.count("the embedding collapses") == 2  # when it was seen, and at the end
    assert f"verdict               {summary['verdict']}" in printed
    assert "bad: the embedding collapses" in (folder / "report.html").read_text()
    with (folder / "metrics.csv").open() as file:
        said = [each["verdict"] for each in csv.DictReader(file)]
    assert (said[0], said[-1]) == ("good", "collapse")


def test_the_documentation_shows_the_measured_table():
    documentation = (ROOT / "docs" / "verdicts.md").read_text()
    with (ROOT / "docs" / "results" / "verdicts" / "verdicts.csv").open() as file:
        rows = list(csv.DictReader(file))
    for each in rows:
        cells = [each[name] for name in ("planted", "script", "data", "settings") if each[name]]
        begin = f"| {' | '.join(cells)} |"
        (line,) = [line for line in documentation.splitlines() if line.startswith(begin)]
        assert each["verdict"] in line
    caught = [each["verdict"] != "good" for each in rows if each["planted"]]
    blamed = [each["verdict"] != "good" for each in rows if not each["planted"]]
    assert f"{sum(caught)} of {len(caught)} are caught" in documentation
    assert f"{sum(blamed)} of {len(blamed)} are blamed" in documentation
