import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize

import classify
import encoded
import functions
from support import checkpoints, datasets, devices, encoders


@pytest.fixture(scope="module")
def digits():
    return functions.load_images("digits")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An untrained encoder of grey images of 8 pixels, in a file, and as a module."""
    path = tmp_path_factory.mktemp("file") / "mine.safetensors"
    torch.manual_seed(0)
    network = encoders.make_encoder("small", "cifar", 1, 8).to(memory_format=torch.channels_last)
    facts = {"encoder": "small", "stem": "cifar", "width": 64, "size": 8}
    facts |= {"mean": [0.3], "std": [0.35], "computed_in": "32-true"}
    checkpoints.save_weights(path, network, {"about": json.dumps(facts)})
    return path, network


@pytest.fixture(scope="module")
def folders(tmp_path_factory, digits):
    """60 labelled digits in a folder for each class, one of them wrong, and 100 others."""
    root = tmp_path_factory.mktemp("images")
    for i in range(160):
        known, image = i < 60, Image.fromarray(digits.train.images[i, 0].numpy())
        place = root / "labelled" / f"digit {digits.train.labels[i]}" if known else root / "new"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i:03}.png")
    zero = min((root / "labelled" / "digit 0").iterdir())
    zero.rename(root / "labelled" / "digit 1" / "wrong.png")
    return root


def start(encoder, folders, output, *flags):
    """Classify a folder; what `main` returns, and the rows of the tables."""
    places = [encoder[0], folders / "labelled", folders / "new", "--output", output]
    places += ["--data-dir", Path(output).parent / "data"]
    scores = classify.main([*map(str, places), "--device", "cpu", *flags])
    tables = []
    for name in ("classes", "labelled"):
        with open(output / f"{name}.csv", encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    return scores, *tables


@pytest.fixture(scope="module")
def classified(encoder, folders):
    return start(encoder, folders, folders / "out")


def features_of(encoder, digits, positions):
    images = digits.train.images[positions]
    split = datasets.Split(images, None, mean=torch.tensor([0.3]), std=torch.tensor([0.35]))
    fabric = devices.make_fabric("cpu", "float32")
    return functions.extract_features(encoder[1], split, fabric).numpy()


def test_the_classes_are_scikit_learns(encoder, folders, digits, tmp_path):
    _, rows, _ = start(encoder, folders, tmp_path / "out", "--method", "linear")
    known = sorted((folders / "labelled").glob("*/*.png"))
    first = next(i for i in range(60) if digits.train.labels[i] == 0)
    positions = [first if path.stem == "wrong" else int(path.stem) for path in known]
    features = features_of(encoder, digits, [*positions, *range(60, 160)])
    features = StandardScaler().fit_transform(features[:, features.std(0) > 1e-6])
    features = normalize(features) * np.sqrt(encoder[1].num_features)
    model = LogisticRegression(max_iter=2000).fit(features[:60], [p.parent.name for p in known])
    assert [row["class"] for row in rows] == model.predict(features[60:]).tolist()
    expected = model.predict_proba(features[60:]).max(1)
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], expected, atol=1e-3)
    assert [row["path"] for row in rows] == [f"{i:03}.png" for i in range(60, 160)]


def test_label_spreading_is_that_of_the_closed_form():
    torch.manual_seed(0)
    features, labels = torch.randn(30, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    length = F.normalize(features, dim=1).double()
    w = torch.zeros(30, 30, dtype=torch.float64)
    for i in range(30):
        cosines = length @ length[i]
        cosines[i] = -2
        for j in cosines.topk(5).indices.tolist():
            w[i, j] += cosines[j].clamp(min=0) ** 3
            w[j, i] += cosines[j].clamp(min=0) ** 3
    s = w / (w.sum(1)[:, None] * w.sum(1)).sqrt()
    y = torch.zeros(30, 3, dtype=torch.float64)
    y[torch.arange(6), labels] = 1
    scores = torch.linalg.solve(torch.eye(30) - 0.8 * s, y)
    scores = scores / scores.sum(0)  # classes of the same size
    predict = classify.make_spreading(features, labels, 5, 0.8)
    found = predict(torch.arange(6), torch.arange(6, 30))
    torch.testing.assert_close(
        found.double(), (scores / scores.sum(1, keepdim=True))[6:], atol=1e-4, rtol=0
    )


def test_what_no_label_reaches_is_of_the_commonest_class():
    torch.manual_seed(0)
    features = torch.cat([torch.randn(40, 16) + 4, torch.randn(30, 16) / 100 - 4])
    predict = classify.make_spreading(features, torch.tensor([1, 1, 1, 0, 0]))
    found = predict(torch.arange(5), torch.arange(5, 70))
    assert torch.equal(found[-30:], torch.tensor([[0.4, 0.6]]).expand(30, 2))
    assert (found[:-30] != found[-1]).all()


@pytest.mark.parametrize("method", ["linear", "spreading"])
def test_what_is_left_out_tells_nothing_of_its_label(method):
    torch.manual_seed(0)
    near, far = torch.randn(40, 16) + 4, torch.randn(30, 16) / 100 - 4
    features = torch.cat([near[:6], far[:2], near[6:], far[2:]])
    found = []
    for labels in ([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 1]):
        predict = classify.METHODS[method][1](features, torch.tensor(labels))
        found.append(predict(torch.arange(5), torch.arange(5, 8)))
    assert torch.equal(*found)
    if method == "spreading":  # the last two are connected with none of the five
        assert torch.equal(found[0][1:], torch.tensor([[0.4, 0.6]]).expand(2, 2))


def test_an_image_is_none_of_its_nearest_also_if_there_are_copies(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        classify.figures, "plot_sheet", lambda path, names, groups, title: drawn.update(groups)
    )
    features = torch.eye(12, 16)[torch.arange(12) // 4]  # four copies each
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    names = np.array([f"a/{i}.png" for i in range(12)])
    labelled = encoded.Collection(names, images, torch.arange(12), features)
    labels, found = torch.arange(12) % 2, torch.full((12, 2), 0.5)
    classify.plot_labelled(tmp_path / "a.png", labelled, ("a", "b"), labels, found, channels=3)
    (own, _), (others, _) = drawn.values()
    for tiles, near in zip(own, others, strict=True):
        i = int(tiles[0, 0, 0, 0])
        copies = {4 * (i // 4) + k for k in range(4)}
        assert set(near[:3, 0, 0, 0].tolist()) == copies - {i}


def test_of_many_classes_the_dozen_largest_are_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(classify.figures, "plot_sheet", lambda *arguments: drawn.extend(arguments))
    sizes = torch.tensor([3, 20, 4, 5, 6, 7, 0, 8, 9, 10, 11, 12, 13, 14, 2])
    guesses = torch.arange(15).repeat_interleave(sizes)
    confidence = torch.linspace(0.5, 0.9, len(guesses))
    likely = F.one_hot(guesses, 15) * confidence[:, None]
    places = torch.arange(len(guesses))
    images = places.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    mine = encoded.Collection(places.numpy().astype(str), images, places, torch.zeros(len(places)))
    classify.plot_classes(Path("a.png"), mine, "abcdefghijklmno", likely, channels=1)
    _, names, groups, _ = drawn
    assert "".join(names) == "bcdefhijklmn"  # not a, g or o
    (surest, sure), (doubtful, _) = groups.values()
    assert sure[0] == [f"{value:.3f}" for value in confidence[guesses == 1].flip(0)[:5].tolist()]
    assert surest[0][:, 0, 0, 0].tolist() == [22, 21, 20, 19, 18]
    assert doubtful[0][:, 0, 0, 0].tolist() == [3, 4, 5, 6, 7]


def test_the_sheets_show_the_surest_first_and_the_least_likely_labels_first(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        classify.figures, "plot_sheet", lambda path, names, groups, title: drawn.append(groups)
    )
    torch.manual_seed(0)
    images = torch.arange(14, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    names = np.array([f"a/{i}.png" for i in range(14)])
    shown = encoded.Collection(names, images, torch.arange(14), torch.randn(14, 6))
    sure = torch.linspace(0.6, 0.99, 14)[torch.randperm(14)]
    likely = torch.stack([sure, 1 - sure], 1)
    classify.plot_classes(tmp_path / "a.png", shown, ("a", "b"), likely, 3)
    labels = torch.arange(14) % 2
    classify.plot_labelled(tmp_path / "b.png", shown, ("a", "b"), labels, likely, 3)
    classes, labelled = drawn
    order = sorted(range(14), key=sure.tolist().__getitem__)
    assert classes["surest"][0][0][:, 0, 0, 0].tolist() == order[:-6:-1]
    assert classes["least sure"][0][0][:, 0, 0, 0].tolist() == order[:5]
    doubted = sorted(range(14), key=lambda i: likely[i, labels[i]].item())
    assert labelled[""][0][:, 0, 0, 0, 0].tolist() == doubted[:12]


def test_what_is_left_out_is_left_out_with_its_duplicates_and_once():
    labels = torch.tensor([0, 1, 2] * 15)
    groups = torch.arange(45) // 9 * 9 + torch.arange(45) % 3  # three images of a class each
    seen = []

    def predict(known, others):
        assert sorted(torch.cat([known, others]).tolist()) == list(range(45))
        assert not set(groups[known].tolist()) & set(groups[others].tolist())
        assert set(labels[known].tolist()) == {0, 1, 2}
        seen.extend(others.tolist())
        return F.one_hot(labels[others], 3).float() * others[:, None]

    found = classify.cross_validate(predict, labels, groups)
    assert sorted(seen) == list(range(45))
    assert torch.equal(found, F.one_hot(labels, 3) * torch.arange(45.0)[:, None])


def test_a_class_that_the_others_lack_is_not_found():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    linear = classify.make_linear(F.one_hot(labels, 3).float() - 1 / 3, labels)
    found = classify.cross_validate(linear, labels, torch.arange(7))
    assert found.argmax(1)[:6].tolist() == labels[:6].tolist()
    assert found[6, 2] == 0


@pytest.mark.parametrize(
    ("labels", "groups"),
    [([0, 1, 2], [0, 1, 2]), ([0, 0, 1], [0, 0, 0]), ([0, 0, 1], [0, 0, 2])],
)
def test_without_others_nothing_can_be_said(labels, groups):
    predict = pytest.fail
    assert classify.cross_validate(predict, torch.tensor(labels), torch.tensor(groups)) is None


def test_a_fold_without_images_is_passed_over():
    # Scikit-learn fills three of four folds.
    labels = torch.tensor([0, 2, 0, 3, 0, 1, 2, 2, 1, 3, 3, 1, 2, 2])
    groups = torch.tensor([3, 1, 3, 2, 1, 0, 0, 3, 3, 0, 2, 0, 0, 3])
    features = F.one_hot(labels, 4).float() - 1 / 4
    found = classify.cross_validate(classify.make_linear(features, labels), labels, groups)
    torch.testing.assert_close(found.sum(1), torch.ones(14))


def test_the_duplicates_of_duplicates_are_of_one_group():
    angles = torch.tensor([0.0, 90.0, 4.0, 180.0, 8.0, 92.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1)
    # 8 degrees are a cosine of 0.9903, 5 degrees 0.9962
    assert classify.group_duplicates(features, 0.996).tolist() == [0, 1, 0, 3, 0, 1]
    assert classify.group_duplicates(features, 1.0).tolist() == [0, 1, 2, 3, 4, 5]
    # The first two are near-duplicates of the last, not of each other.
    later = features[[0, 4, 1, 2]]
    assert classify.group_duplicates(later, 0.996).tolist() == [0, 0, 2, 0]


def test_near_duplicates_by_the_encoders_features_are_left_out_together(
    encoder, folders, digits, tmp_path, monkeypatch
):
    given = []
    monkeypatch.setattr(
        classify, "cross_validate", lambda predict, labels, groups: given.append(groups)
    )
    known = sorted((folders / "labelled").glob("*/*.png"))
    first = next(i for i in range(60) if digits.train.labels[i] == 0)
    positions = [first if path.stem == "wrong" else int(path.stem) for path in known]
    features = torch.from_numpy(features_of(encoder, digits, positions))
    lengths = F.normalize(features, dim=1)
    threshold = f"{(lengths @ lengths.T).quantile(0.95):.4f}"  # no borderline at four digits
    places = [encoder[0], folders / "labelled", folders / "new", "--output", tmp_path / "out"]
    places += ["--data-dir", tmp_path, "--duplicates", threshold, "--method", "linear"]
    classify.main([*map(str, places), "--device", "cpu"])
    mean, std = functions.feature_statistics(features)
    ours, standardised = (
        classify.group_duplicates(F.normalize(part, dim=1), float(threshold)).tolist()
        for part in (features, (features - mean) / std)
    )
    assert given[0].tolist() == ours != standardised
    assert 1 < len(set(ours)) < 60


def test_the_wrong_label_stands_first_and_the_score_is_of_the_table(classified):
    scores, _, rows = classified
    assert rows[0] | {"confidence": "", "found_confidence": ""} == {
        "path": "digit 1/wrong.png",
        "class": "digit 1",
        "confidence": "",
        "found": "digit 0",
        "found_confidence": "",
    }
    assert len(rows) == 60
    assert [float(row["confidence"]) for row in rows] == sorted(
        float(row["confidence"]) for row in rows
    )
    right = sum(row["found"] == row["class"] for row in rows)
    assert right / 60 == max(scores.values()) > 0.6


def test_the_score_is_about_what_the_others_get(classified, digits):
    scores, rows, _ = classified
    right = sum(
        row["class"] == f"digit {digits.train.labels[int(Path(row['path']).stem)]}" for row in rows
    )
    assert abs(right / 100 - max(scores.values())) < 2 * np.sqrt(0.2 * 0.8 * (1 / 60 + 1 / 100))


def test_the_summary_says_how_sure_it_is(encoder, folders, tmp_path, capsys):
    scores, *_ = start(encoder, folders, tmp_path / "out", "--method", "spreading")
    text = capsys.readouterr().out
    for line in (
        "images to classify    100\n",
        "labelled images       60 of 10 classes\n",
        "classified by label spreading\n",
    ):
        assert line in text
    most = max(len(list(place.iterdir())) for place in (folders / "labelled").iterdir())
    assert f"  the commonest class {100 * most / 60:.1f} %\n" in text
    p, z = scores["spreading"], 1.959964  # Wilson 1927
    middle, half = p + z * z / 120, z * np.sqrt(p * (1 - p) / 60 + z * z / 120**2)
    low, high = ((middle + sign * half) / (1 + z * z / 60) for sign in (-1, 1))
    words = f"label spreading     {100 * p:.1f} % [{100 * low:.1f} %, {100 * high:.1f} %]"
    assert words in text
    assert {"classes.png", "labelled.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_an_image_is_as_bright_in_one_folder_as_in_the_other(encoder, digits, tmp_path, capsys):
    for place, count in (("labelled/a", 8), ("labelled/b", 8), ("new", 16)):
        (tmp_path / place).mkdir(parents=True)
        start = 8 if place.endswith("b") else 0
        for i in range(start, start + count):
            levels = digits.train.images[i, 0].numpy().astype(np.uint16) * 16  # 12 bits
            Image.fromarray(levels).save(tmp_path / place / f"{i:02}.png")
    Image.fromarray(levels * 16).save(tmp_path / "new/bright.png")
    places = [encoder[0], tmp_path / "labelled", tmp_path / "new", "--output", tmp_path / "out"]
    flags = ["--data-dir", tmp_path / "data", "--device", "cpu", "--method", "linear"]
    classify.main([*map(str, [*places, *flags])])
    text = capsys.readouterr().out.partition("once more, with one range for both folders:\n")[2]
    assert text.startswith("black is 0 and white 65535 in images of more than 8 bits\n" * 2)
    with open(tmp_path / "out/classes.csv", newline="") as file:
        found = {row["path"]: row["class"] for row in csv.DictReader(file)}
    assert found.pop("bright.png")
    assert found == {f"{i:02}.png": "a" if i < 8 else "b" for i in range(16)}


def test_near_duplicates_do_not_narrow_the_interval(capsys):
    labels = torch.tensor([0, 1]).repeat_interleave(60)  # 12 scenes, ten copies of each
    groups = torch.arange(12).repeat_interleave(10) * 10
    found = F.one_hot(torch.where(torch.arange(120) < 30, 1 - labels, labels)).float()
    classify.show_score("", found, labels, groups)
    # Wilson's interval of 9 right of 12, by the formula of 1927.
    p, n, z = 0.75, 12, 1.959964
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert f"75.0 % [{low:.1f} %, {high:.1f} %]" in capsys.readouterr().out


def test_one_image_of_each_class_classifies_and_tells_no_score(encoder, folders, tmp_path, capsys):
    for name in ("digit 0", "digit 1"):
        path = min((folders / "labelled" / name).iterdir())
        (tmp_path / "labelled" / name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "labelled" / name)
    shutil.copytree(folders / "new", tmp_path / "new")
    places = [encoder[0], tmp_path / "labelled", tmp_path / "new", "--output", tmp_path / "out"]
    scores = classify.main([*map(str, places), "--data-dir", str(tmp_path / "data")])
    assert scores == {}
    assert "unknown: it takes two images of a class" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"classes.csv", "classes.png"}


def test_mistakes_get_a_line(encoder, folders, tmp_path, user_error):
    new, labelled = folders / "new", folders / "labelled"
    (tmp_path / "empty").mkdir()
    for part in ("train", "test"):
        shutil.copytree(labelled, tmp_path / "split" / part)
    for words, arguments in (
        (("060.png", "in no folder of a class"), (new, new)),
        (("digit 1", "takes two"), (folders / "one", new)),
        (("test, train", "give one of them"), (tmp_path / "split", new)),
        (("nowhere",), (tmp_path / "nowhere", new)),
        (("empty", "no images"), (labelled, tmp_path / "empty")),
        (("--duplicates", "0"), (labelled, new, "--duplicates", "0")),
        (("--method", "forest"), (labelled, new, "--method", "forest")),
        (("new", "not empty"), (labelled, new, "--output", new)),
    ):
        (folders / "one").mkdir(exist_ok=True)
        if not (folders / "one" / "digit 1").exists():
            shutil.copytree(labelled / "digit 1", folders / "one" / "digit 1")
        with user_error(*words):
            classify.main([str(encoder[0]), *map(str, arguments), "--data-dir", str(tmp_path)])
    assert not (Path("results") / "classify" / "mine-new").exists()


def test_the_command_ends_with_one_line_and_code_2(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["classify.py", str(encoder[0]), str(tmp_path), "nowhere"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("classify.py", run_name="__main__")
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
