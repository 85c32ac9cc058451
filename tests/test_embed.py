import csv
import dataclasses
import importlib.util
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_folders import needs_names_of_bytes
from pictures import unrendered
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import embed
import functions
import simclr
from support import (
    checkpoints,
    datasets,
    decoding,
    devices,
    encoders,
    figures,
    files,
    frozen,
    settings,
)


def write_digits(folder, split, positions):
    """Write images of a split as files, each in a folder of its class, and return their paths."""
    names = []
    for i in positions:
        names.append(f"{split.labels[i]}/{i:03}.png")
        (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(split.images[i, 0].numpy()).save(folder / names[-1])
    return names


@pytest.fixture(scope="module")
def digits():
    return functions.load_images("digits")


each_precision = pytest.mark.parametrize("trained", ["float32", "bfloat16"], indirect=True)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory, digits):
    """A finished run, and 40 of its test images and 5 of its training images."""
    precision = getattr(request, "param", "float32")
    home = tmp_path_factory.mktemp(precision)
    with pytest.MonkeyPatch.context() as patch:
        if precision == "bfloat16":  # as on a processor that has units for it
            patch.setattr(devices, "_cpu_capabilities", lambda: {"avx512_bf16": True})
        config = simclr.Config(
            dataset="digits",
            data_dir=str(home / "data"),
            output_dir=str(home / "results"),
            name="run",
            encoder="small",
            epochs=1,
            batch_size=256,
            probe_epochs=5,
            few_labels=0,
            knn_every=0,
            stages="pretrain,probe",
            device="cpu",
            precision=precision,
        )
        with unrendered():
            simclr.main(config)
        run = home / "results" / "simclr" / "run"
        tests = write_digits(home / "images" / "seen later", digits.test, range(40))
        training = write_digits(home / "images" / "seen", digits.train, range(5))
        fabric = devices.make_fabric("cpu", precision)
        encoder = encoders.make_encoder("small", "cifar", 1, 8).to(
            memory_format=torch.channels_last
        )
        encoder.load_state_dict(checkpoints.load_tensors(run / "encoder.safetensors")[0])
        features = {
            part: functions.extract_features(encoder, getattr(digits, part), fabric).numpy()
            for part in ("train", "test")
        }
        yield SimpleNamespace(
            home=home, run=run, images=home / "images", tests=tests, training=training, **features
        )


def start(run, folder, output, *flags):
    """Embed a folder and return what was written: arrays, and rows of the two tables."""
    data_dir = ["--data-dir", str(Path(output).parent / "data")]
    arguments = [str(run), str(folder), "--output", str(output), "--device", "cpu", *data_dir]
    counts = embed.main([*arguments, *flags])
    tables = {}
    for name in ("images", "neighbours"):
        with open(output / f"{name}.csv", encoding="utf-8", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    return SimpleNamespace(
        counts=counts, arrays=files.read_arrays(output / "features.npz"), **tables
    )


@pytest.fixture(scope="module")
def embedded(trained):
    return start(trained.run, trained.images, trained.home / "out")


def read_page(folder):
    """What `embedding.html` shows."""
    text = (folder / "embedding.html").read_text(encoding="utf-8")
    return json.loads(re.search(r"^const data = (.*);$", text, re.MULTILINE)[1])


def position(path):
    return int(Path(path).stem)


# -------------------------------------------------------------------------- features and probe


@each_precision
def test_features_are_those_of_the_runs_evaluation(trained, embedded):
    paths = embedded.arrays["paths"].tolist()
    names = [f"seen/{name}" for name in trained.training]
    names += [f"seen later/{name}" for name in trained.tests]
    assert paths == sorted(names, key=Path)
    for path, features in zip(paths, embedded.arrays["features"], strict=True):
        part = trained.train if path.startswith("seen/") else trained.test
        assert np.array_equal(features, part[position(path)])


@pytest.mark.usefixtures("unrendered_pictures")
@pytest.mark.parametrize("trained", ["bfloat16"], indirect=True)
def test_without_units_for_bfloat16_it_is_not_emulated(trained, digits, tmp_path, monkeypatch):
    # An encoder of a GPU on a laptop: emulated, the same features take ten times as long.
    monkeypatch.setattr(devices, "_cpu_capabilities", dict)
    encoder = frozen.load_encoder(trained.run, "cpu")
    features = functions.extract_features(encoder.network, digits.test, encoder.fabric)
    assert torch.equal(features, functions.extract_features(encoder.network, digits.test))
    others = torch.from_numpy(trained.test)
    assert 0 < (features - others).norm() < 0.02 * others.norm()
    # Nor when the run is evaluated again there.
    run = shutil.copytree(trained.run, tmp_path / "run")
    config = settings.load_config(simclr.Config, run)
    simclr.main(dataclasses.replace(config, resume=str(run), stages="probe"))
    probe = checkpoints.load_tensors(run / "probe.safetensors")[0]
    predictions = functions.apply_probe(features, probe).argmax(1).numpy()
    assert np.array_equal(files.read_arrays(run / "predictions.npz")["predictions"], predictions)
    bank = functions.extract_features(encoder.network, digits.train)
    assert torch.equal(probe["mean"], functions.feature_statistics(bank)[0])


@pytest.mark.usefixtures("unrendered_pictures")
@each_precision
@pytest.mark.parametrize("count", [1, 2, 3, 501])
def test_features_do_not_depend_on_how_many_images_there_are(
    trained, digits, tmp_path, monkeypatch, count
):
    # In steps of 500 these leave one to three images, which by themselves round otherwise.
    if count > 3:
        monkeypatch.setattr(functions, "images_per_step", lambda images: 100)
        count = 101
    names = write_digits(tmp_path / "in", digits.test, range(count))
    arrays = start(trained.run, tmp_path / "in", tmp_path / "out", "--no-training").arrays
    assert sorted(names) == arrays["paths"].tolist()
    for path, features in zip(arrays["paths"], arrays["features"], strict=True):
        assert np.array_equal(features, trained.test[position(path)])


@each_precision
def test_classes_are_those_that_the_run_predicted(trained, embedded, digits):
    predicted = files.read_arrays(trained.run / "predictions.npz")["predictions"]
    probe = checkpoints.load_tensors(trained.run / "probe.safetensors")[0]
    weight, bias, mean, std = (
        probe[name].numpy().astype(float) for name in ("weight", "bias", "mean", "std")
    )
    arrays = embedded.arrays
    for i, row in enumerate(embedded.images):
        assert row["path"] == arrays["paths"][i]
        assert row["class"] == digits.classes[arrays["predictions"][i]]
        logits = weight @ ((arrays["features"][i] - mean) / std) + bias
        share = np.exp(logits - logits.max())
        share /= share.sum()
        assert arrays["probabilities"][i] == pytest.approx(share.max(), abs=1e-4)
        assert float(row["probability"]) == pytest.approx(share.max(), abs=2e-4)
        if row["path"].startswith("seen later/"):
            assert arrays["predictions"][i] == predicted[position(row["path"])]


def test_map_has_a_place_for_each_image(embedded):
    places = embedded.arrays["coordinates"]
    assert np.isfinite(places).all()
    for row, place in zip(embedded.images, places, strict=True):
        np.testing.assert_allclose([float(row["x"]), float(row["y"])], place, atol=1e-3)


def test_images_beyond_those_of_the_map_are_left_out_of_it(trained, tmp_path, monkeypatch):
    chosen = torch.randperm(45, generator=torch.Generator().manual_seed(0))[:20]
    monkeypatch.setattr(embed, "MAPPED", 20)
    found = start(trained.run, trained.images, tmp_path / "out", "--no-training")
    places = found.arrays["coordinates"]
    assert np.flatnonzero(np.isfinite(places).all(1)).tolist() == sorted(chosen.tolist())
    assert np.isnan(places).sum() == 2 * 25
    assert [row["x"] == "" for row in found.images] == np.isnan(places[:, 0]).tolist()
    if importlib.util.find_spec("plotly") is None:
        return
    page = read_page(tmp_path / "out")
    mapped = sorted(chosen.tolist())
    assert page["names"] == [found.images[i]["path"] for i in mapped]
    search = NearestNeighbors(n_neighbors=5, metric="cosine")
    search.fit(found.arrays["features"][mapped])
    assert page["neighbours"] == search.kneighbors(return_distance=False).tolist()


# -------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("where", ["folder", "training"])
def test_neighbours_are_scikit_learns(trained, embedded, where):
    features, paths = embedded.arrays["features"], embedded.arrays["paths"]
    bank = features if where == "folder" else trained.train
    names = paths if where == "folder" else [f"digits {i}" for i in range(len(bank))]
    search = NearestNeighbors(n_neighbors=5, metric="cosine").fit(bank)
    distance, index = search.kneighbors() if where == "folder" else search.kneighbors(features)
    rows = [row for row in embedded.neighbours if row["where"] == where]
    assert [row["query"] for row in rows] == np.repeat(paths, 5).tolist()
    assert [row["rank"] for row in rows] == list("12345") * len(paths)
    similarity = np.array([float(row["similarity"]) for row in rows]).reshape(-1, 5)
    np.testing.assert_allclose(similarity, 1 - distance, atol=2e-5)
    places = {name: i for i, name in enumerate(names)}
    found = np.array([places[row["neighbour"]] for row in rows]).reshape(-1, 5)
    clear = np.diff(distance, append=np.inf) > 1e-5  # of equals either may come first
    clear[:, 1:] &= clear[:, :-1]
    assert clear.mean() > 0.9
    assert np.array_equal(found[clear], index[clear])
    first = [row for row in rows if row["rank"] == "1"]
    prefix = "training_" if where == "training" else ""
    for row, best in zip(embedded.images, first, strict=True):
        assert row[f"{prefix}neighbour"] == best["neighbour"]
        assert row[f"{prefix}similarity"] == best["similarity"]


def test_training_images_in_the_folder_are_found_out(embedded):
    seen = [row for row in embedded.images if row["path"].startswith("seen/")]
    assert len(seen) == 5
    for row in seen:
        assert row["training_neighbour"] == f"digits {position(row['path'])}"
        assert row["training_similarity"] == "1.00000"


@pytest.mark.usefixtures("unrendered_pictures")
def test_fewer_neighbours_are_written_when_so_many_are_asked_for(trained, tmp_path):
    flags = ("--neighbours", "2", "--no-training")
    found = start(trained.run, trained.images, tmp_path / "out", *flags)
    assert len(found.neighbours) == 2 * 45
    assert {row["where"] for row in found.neighbours} == {"folder"}
    assert {row["training_neighbour"] for row in found.images} == {""}


@pytest.mark.usefixtures("unrendered_pictures")
def test_near_duplicates_name_the_first_of_them(trained, digits, tmp_path):
    write_digits(tmp_path / "in", digits.test, range(30))
    original = f"{digits.test.labels[7]}/007.png"
    (tmp_path / "in" / "copies").mkdir()
    for name in ("1.png", "2.png"):
        shutil.copy(tmp_path / "in" / original, tmp_path / "in" / "copies" / name)
    found = start(trained.run, tmp_path / "in", tmp_path / "a", "--duplicates", "1")
    expected = {"copies/1.png": original, "copies/2.png": original}
    assert {r["path"]: r["duplicate_of"] for r in found.images if r["duplicate_of"]} == expected
    assert found.counts == {"images": 32, "broken": 0, "duplicates": 2}
    found = start(trained.run, tmp_path / "in", tmp_path / "b", "--duplicates", "0.8")
    exact = found.arrays["features"].astype(float)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    for i, row in enumerate(found.images):
        alike = [j for j in range(i) if exact[i] @ exact[j] >= 0.8 - 1e-5]
        assert row["duplicate_of"] == (found.arrays["paths"][alike[0]] if alike else "")
    assert found.counts["duplicates"] > 2


# ------------------------------------------------------------- an encoder's file, odd images


@pytest.fixture(scope="module")
def colour_file(tmp_path_factory):
    """An untrained encoder of colour images of 16 pixels, as a file alone."""
    path = tmp_path_factory.mktemp("file") / "mine.safetensors"
    torch.manual_seed(0)
    encoder = encoders.make_encoder("small", "cifar", 3, 16)
    facts = {"encoder": "small", "stem": "cifar", "width": 64, "size": 16}
    facts |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "computed_in": "32-true"}
    checkpoints.save_weights(path, encoder, {"about": json.dumps(facts)})
    return path


TEAL, ROSE = (10, 120, 130), (230, 40, 90)


def write_odd_images(folder):
    """Write images of all sorts, two of each that an encoder must see alike."""
    deep = folder / "a" / "deep er" / "Füße"
    deep.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    grey = noise[..., 0]
    levels = grey.astype(np.uint16) * 257
    pairs = {
        "$x$ grey": (Image.fromarray(grey), Image.fromarray(np.stack([grey] * 3, 2))),
        "transparent": (Image.new("RGBA", (9, 30), (*TEAL, 0)), Image.new("RGB", (5, 5), "white")),
        "16-bit": (Image.fromarray(levels), Image.fromarray(grey)),
        "tiny": (Image.new("RGB", (1, 1), TEAL), Image.new("RGB", (40, 20), TEAL)),
        "palette": (Image.new("RGB", (16, 16), ROSE).quantize(2), Image.new("RGB", (3, 3), ROSE)),
        "図 _[1]*": (Image.fromarray(noise), Image.fromarray(noise).convert("RGBA")),
    }
    names = []
    for name, images in pairs.items():
        for place, image in zip((folder, deep), images, strict=True):
            image.save(place / f"{name}.png")
            names.append(str((place / f"{name}.png").relative_to(folder)))
    return names


def test_odd_images_are_seen_as_they_are_meant(colour_file, tmp_path):
    names = write_odd_images(tmp_path / "in")
    found = start(colour_file, tmp_path / "in", tmp_path / "out")
    places = {path: i for i, path in enumerate(found.arrays["paths"].tolist())}
    assert places.keys() == set(names)
    features = found.arrays["features"]
    assert features.dtype == np.float32
    for plain, nested in zip(names[::2], names[1::2], strict=True):
        assert np.array_equal(features[places[plain]], features[places[nested]]), plain
    assert len(np.unique(features, axis=0)) == 5  # two of the pairs are the same grey image
    assert [row["path"] for row in found.images] == sorted(names, key=places.get)
    assert {row["class"] for row in found.images} == {""}


def test_features_of_a_file_alone_are_the_encoders(colour_file, tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (7, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    found = start(colour_file, tmp_path / "in", tmp_path / "out")
    encoder = encoders.make_encoder("small", "cifar", 3, 16).eval()
    encoder.load_state_dict(checkpoints.load_tensors(colour_file)[0])
    inputs = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.25]  # (7, H, W, C)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(inputs).permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(found.arrays["features"], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_colour_images_become_pillows_grey_for_a_grey_encoder():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 40, 3), np.uint8)
    pixels[:10] = pixels[:10, :, :1]  # grey ones
    seen = datasets.with_channels(torch.from_numpy(pixels).permute(2, 0, 1)[None], 1)
    assert np.array_equal(seen[0, 0].numpy(), np.asarray(Image.fromarray(pixels).convert("L")))
    assert np.array_equal(seen[0, 0, :10].numpy(), pixels[:10, :, 0])


@needs_names_of_bytes
def test_name_that_is_no_utf8_is_kept_and_spelled_in_the_tables(colour_file, tmp_path):
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    for place in (name, "b.png"):
        Image.new("RGB", (16, 16), TEAL).save(tmp_path / "in" / place)
    found = start(colour_file, tmp_path / "in", tmp_path / "out")
    assert set(found.arrays["paths"].tolist()) == {name, "b.png"}
    assert {row["path"] for row in found.images} == {"b.png", r"caf\udce9.png"}


def test_contact_sheet_shows_each_image_beside_its_neighbours(colour_file, tmp_path):
    (tmp_path / "in").mkdir()
    colours = [TEAL, ROSE, (250, 200, 0), (60, 20, 200)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "in" / f"${i}.png")
    found = start(colour_file, tmp_path / "in", tmp_path / "out")
    nearest = {row["query"]: row["neighbour"] for row in found.neighbours if row["rank"] == "1"}
    with Image.open(tmp_path / "out" / "neighbours.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    queries, seen = [], pixels.reshape(-1, 3)
    for colour in colours:
        rows, columns = np.nonzero((pixels == colour).all(2))
        assert len(seen[(seen == colour).all(1)]) > 4 * 50**2  # once as a query, three times found
        queries.append((rows[columns == columns.min()], columns.min()))
    assert len({left for _, left in queries}) == 1  # the queries stand in one column
    tops = [rows.min() for rows, _ in queries]
    assert tops == sorted(tops)
    for i, (rows, left) in enumerate(queries):
        line = pixels[(rows.min() + rows.max()) // 2, left:]
        shown = [colours.index(tuple(c)) for c in line.tolist() if tuple(c) in colours]
        order = list(dict.fromkeys(shown))
        assert order[0] == i
        assert f"${order[1]}.png" == nearest[f"${i}.png"]


def test_page_shows_the_map(trained, embedded):
    pytest.importorskip("plotly")
    page = read_page(trained.home / "out")
    assert "45 images of images by run" in (trained.home / "out" / "embedding.html").read_text()
    assert page["names"] == [row["path"] for row in embedded.images]
    assert page["points"] == [[float(row["x"]), float(row["y"])] for row in embedded.images]
    shown = [page["classes"][label] for label in page["labels"]]
    assert shown == [row["class"] for row in embedded.images]
    nearest = [row["neighbour"] for row in embedded.neighbours if row["where"] == "folder"]
    assert [page["names"][i] for row in page["neighbours"] for i in row] == nearest


def test_without_plotly_only_the_page_is_missing(trained, tmp_path, monkeypatch, capsys):
    find_spec = embed.runs.importlib.util.find_spec
    hidden = lambda name: None if name == "plotly" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(embed.runs.importlib.util, "find_spec", hidden)
    start(trained.run, trained.images, tmp_path / "out", "--no-training")
    assert "embedding.html is left out" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"features.npz", "images.csv", "neighbours.csv", "neighbours.png"}


# ---------------------------------------------------------------------------- broken images


@pytest.fixture
def mixed(tmp_path):
    """A folder of five good images and three that cannot be read."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (i * 50, 255 - i * 50, 99)).save(folder / f"good{i}.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "good2 cut.png")
    os.truncate(folder / "good2 cut.png", 5000)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "link.png").symlink_to("nowhere")
    return folder


def test_broken_images_are_named_and_passed_over(colour_file, mixed, tmp_path, capsys):
    for output in ("first", "from the cache"):
        found = start(colour_file, mixed, tmp_path / output)
        assert found.arrays["paths"].tolist() == [f"good{i}.png" for i in range(5)]
        assert found.counts["broken"] == 3
        out = capsys.readouterr().out
        for name in (
            "empty.jpg: no image format",
            "good2 cut.png: image file is trunc",
            "link.png",
        ):
            assert f"passed over: {name}" in out
        assert "passed over           3" in out
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in mixed.glob("good?.png"):
        shutil.copy(path, alone)
    expected = start(colour_file, alone, tmp_path / "out").arrays
    assert np.array_equal(found.arrays["features"], expected["features"])


def test_strict_stops_at_a_broken_image(colour_file, mixed, tmp_path, user_error):
    with user_error(mixed / "empty.jpg", "cannot be read"):
        start(colour_file, mixed, tmp_path / "out", "--strict")
    assert not (tmp_path / "out").exists()
    for name in ("empty.jpg", "good2 cut.png", "link.png"):
        (mixed / name).unlink()
    assert start(colour_file, mixed, tmp_path / "out", "--strict").counts["images"] == 5


def test_command_ends_with_one_line_and_code_2(
    colour_file, mixed, tmp_path, monkeypatch, capsys, signals
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embed.py", str(colour_file), str(mixed), "--strict"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(embed.__file__, run_name="__main__")
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert "empty.jpg" in line


def test_folder_in_which_nothing_can_be_read_is_named(colour_file, mixed, tmp_path, user_error):
    for path in mixed.glob("good?.png"):
        path.write_text("no image")
    with user_error(mixed, "none of the 8"):
        start(colour_file, mixed, tmp_path / "out")


# ---------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("seed", [2**40, 1, 2])  # k-means numbers them otherwise
def test_groups_are_those_that_lie_apart_the_largest_first(seed):
    draw = torch.Generator().manual_seed(0)
    truth = torch.tensor([2] * 12 + [0] * 20 + [4] * 4 + [1] * 16 + [3] * 8)
    centres = 3 * torch.randn(5, 16, generator=draw)
    features = centres[truth] + torch.randn(60, 16, generator=draw) / 4
    groups, distances = embed.group_images(features, 5, seed)
    assert torch.equal(groups, truth)
    scaled = features / features.norm(dim=1, keepdim=True) * 4
    for i in range(60):
        centre = scaled[truth == truth[i]].mean(0)
        assert distances[i] == pytest.approx((scaled[i] - centre).norm().item(), abs=1e-3)


def test_each_image_has_a_group_and_the_map_shows_it(trained, colour_file, tmp_path, monkeypatch):
    sheets = {}
    monkeypatch.setattr(
        figures, "plot_sheet", lambda path, names, groups, title: sheets.update({path.name: groups})
    )
    found = start(trained.run, trained.images, tmp_path / "out", "--groups", "3")
    sizes = [[int(row["group"]) for row in found.images].count(group) for group in (1, 2, 3)]
    assert sum(sizes) == 45
    assert sizes == sorted(sizes, reverse=True)
    # They are groups of standardised features.
    features = torch.from_numpy(np.load(tmp_path / "out" / "features.npz")["features"])
    standardised = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-6)
    expected, distances = embed.group_images(
        standardised, 3, json.loads((trained.run / "config.json").read_text())["seed"]
    )
    assert [int(row["group"]) for row in found.images] == (expected + 1).tolist()
    [(drawn, _)] = sheets["groups.png"].values()
    for group, tiles in enumerate(drawn):  # of the dozen nearest to the centre, nearest first
        members = (expected == group).nonzero()[:, 0]
        nearest = members[distances[members].argsort(stable=True)[:11]]
        for tile, i in zip(tiles, nearest, strict=True):
            image = Image.open(trained.images / found.images[i]["path"])
            assert np.array_equal(tile[0], np.asarray(image))
    page = tmp_path / "out" / "embedding.html"
    assert "coloured by the linear probe" in page.read_text(encoding="utf-8")
    start(colour_file, trained.images, tmp_path / "bare", "--groups", "3")
    page = tmp_path / "bare" / "embedding.html"
    assert "coloured by group" in page.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------- few and alike


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_images_have_no_map_but_everything_else(trained, digits, tmp_path, capsys, count):
    write_digits(tmp_path / "in", digits.test, range(count))
    found = start(trained.run, tmp_path / "in", tmp_path / "out")
    assert f"at least 5 images, not {count}" in capsys.readouterr().out
    assert np.isnan(found.arrays["coordinates"]).all()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"features.npz", "images.csv", "neighbours.csv", "neighbours.png"}
    assert len(found.neighbours) == count * (count - 1 + 5)
    assert all(row["training_neighbour"] and row["class"] for row in found.images)


def test_one_image_of_a_file_alone_has_no_neighbours(colour_file, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16), TEAL).save(tmp_path / "in" / "a.png")
    found = start(colour_file, tmp_path / "in", tmp_path / "out")
    assert found.neighbours == []
    assert (tmp_path / "out" / "neighbours.csv").read_text().startswith("query,rank,")
    assert [row["path"] for row in found.images] == ["a.png"]


def test_copies_of_one_image_stand_at_one_point(colour_file, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), TEAL).save(tmp_path / "in" / f"{i}.png")
    found = start(colour_file, tmp_path / "in", tmp_path / "out", "--groups", "2")
    assert not found.arrays["coordinates"].any()
    assert {row["group"] for row in found.images} == {"1"}
    assert [row["duplicate_of"] for row in found.images] == ["", *["0.png"] * 5]


# -------------------------------------------------- older files, missing data, and mistakes


def copy_without(trained, folder, *facts, **record):
    """A copy of the run as an older version left it, with other settings in its record."""
    shutil.copytree(trained.run, folder)
    weights, about = checkpoints.load_tensors(folder / "encoder.safetensors")
    for name in facts:
        del about[name]
    metadata = {"about": json.dumps(about)}
    checkpoints.save_tensors(folder / "encoder.safetensors", weights, metadata)
    saved = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", saved | record)
    return folder


@pytest.mark.usefixtures("unrendered_pictures")
def test_a_stack_of_images_is_taken_when_asked_for(trained, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "in" / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (8, 8), "green").save(tmp_path / "in" / "still.png")
    counts = start(trained.run, tmp_path / "in", tmp_path / "out").counts
    assert (counts["images"], counts["broken"]) == (1, 1)
    assert "--stack first" in capsys.readouterr().out
    counts = start(trained.run, tmp_path / "in", tmp_path / "more", "--stack", "first").counts
    assert (counts["images"], counts["broken"]) == (2, 0)


def test_older_run_is_read_with_its_config(trained, embedded, tmp_path, user_error):
    old = copy_without(trained, tmp_path / "old", "size", "computed_in")
    (old / "probe.safetensors").unlink()
    found = start(old, trained.images, tmp_path / "out")
    assert np.array_equal(found.arrays["features"], embedded.arrays["features"])
    assert "predictions" not in found.arrays
    (old / "config.json").unlink()
    with user_error(old / "encoder.safetensors", "config.json"):
        start(old, trained.images, tmp_path / "out2")


MISSING = {
    "other images": ({"data": "00000000"}, "other images"),
    "moved folder": ({"dataset": "/no/such/folder"}, "/no/such/folder"),
}


@pytest.mark.usefixtures("unrendered_pictures")
@pytest.mark.parametrize(("record", "word"), MISSING.values(), ids=MISSING)
def test_training_images_that_are_gone_are_left_out(trained, tmp_path, capsys, record, word):
    run = copy_without(trained, tmp_path / "old", **record)
    found = start(run, trained.images, tmp_path / "out")
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "are left out" in s]
    assert word in line
    assert {row["where"] for row in found.neighbours} == {"folder"}


@pytest.mark.usefixtures("unrendered_pictures")
def test_training_images_without_labels_are_those_of_all_folders(trained, tmp_path, capsys):
    rules = decoding.PixelRules(channels=1)
    where = (str(trained.images), tmp_path / "data", 8, None, rules)
    data = functions.load_images(*where, unlabelled=True)
    record = {"dataset": where[0], "image_size": 8, "channels": 1, "unlabelled": True}
    run = copy_without(trained, tmp_path / "run", **record, data=data.fingerprint())
    found = start(run, trained.images, tmp_path / "out")
    assert "are left out" not in capsys.readouterr().out
    for row in found.images:
        assert row["training_neighbour"] == row["path"]


@pytest.mark.usefixtures("unrendered_pictures")
@pytest.mark.parametrize("record", [{"seed": None}, {"dataset": 5, "value_range": "none"}])
def test_a_config_json_of_another_program_is_no_record(trained, tmp_path, capsys, record):
    run = copy_without(trained, tmp_path / "run")
    files.write_json(run / "config.json", record)
    found = start(run, trained.images, tmp_path / "out")
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "are left out" in s]
    assert "there is no config.json beside the encoder" in line
    assert {row["where"] for row in found.neighbours} == {"folder"}


@pytest.mark.usefixtures("unrendered_pictures")
def test_neighbours_are_looked_for_where_the_run_was_trained(trained, digits, tmp_path, capsys):
    rest = digits.with_validation_split()
    record = {"evaluate_on": "validation", "data": rest.fingerprint()}
    run = copy_without(trained, tmp_path / "run", **record)
    found = start(run, trained.images, tmp_path / "out")
    kept = {image.numpy().tobytes() for image in rest.train.images}
    features = F.normalize(torch.from_numpy(trained.train), dim=1)
    seen = sum(image.numpy().tobytes() in kept for image in digits.train.images[:5])
    assert f"of training images  {seen} " in capsys.readouterr().out
    assert seen > 0
    mine = dict(zip(found.arrays["paths"], found.arrays["features"], strict=True))
    for row in (row for row in found.neighbours if row["where"] == "training"):
        place = position(row["neighbour"].removeprefix("digits "))  # in the whole data set
        assert digits.train.images[place].numpy().tobytes() in kept
        query = F.normalize(torch.from_numpy(mine[row["query"]]), dim=0)
        similarity = (features[place] * query).sum().item()
        assert float(row["similarity"]) == pytest.approx(similarity, abs=2e-5)


def remove_encoder(run):
    (run / "encoder.safetensors").unlink()


def swap_encoder(run):
    _, about = checkpoints.load_tensors(run / "encoder.safetensors")
    other = encoders.make_encoder("small", "cifar", 3, 8)
    metadata = {"about": json.dumps(about)}
    checkpoints.save_weights(run / "encoder.safetensors", other, metadata)


def swap_probe(run):
    tensors, about = checkpoints.load_tensors(run / "probe.safetensors")
    tensors["weight"] = tensors["weight"][:, :5]
    metadata = {"about": json.dumps(about)}
    checkpoints.save_tensors(run / "probe.safetensors", tensors, metadata)


def forget_facts(run):
    weights, _ = checkpoints.load_tensors(run / "encoder.safetensors")
    checkpoints.save_tensors(run / "encoder.safetensors", weights, {})


def name_the_range(run):
    weights, about = checkpoints.load_tensors(run / "encoder.safetensors")
    metadata = {"about": json.dumps({**about, "value_range": {"black": 0, "white": 1}})}
    checkpoints.save_tensors(run / "encoder.safetensors", weights, metadata)


DAMAGES = {
    "unfinished": (remove_encoder, "no encoder.safetensors"),
    "no run at all": (shutil.rmtree, "there is no"),
    "cut": (lambda run: os.truncate(run / "encoder.safetensors", 900), "encoder.safetensors"),
    "empty": (lambda run: os.truncate(run / "encoder.safetensors", 0), "encoder.safetensors"),
    "other weights": (swap_encoder, "encoder.safetensors"),
    "no facts": (forget_facts, "encoder.safetensors"),
    "other facts": (name_the_range, "encoder.safetensors"),
    "other probe": (swap_probe, "probe.safetensors"),
    "cut probe": (lambda run: os.truncate(run / "probe.safetensors", 99), "probe.safetensors"),
    "no config": (lambda run: (run / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize(("harm", "word"), DAMAGES.values(), ids=DAMAGES)
def test_unusable_run_is_named(trained, tmp_path, user_error, harm, word):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    harm(run)
    with user_error(run, word):
        start(run, trained.images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_get_a_line(trained, tmp_path, user_error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    run, images = trained.run, trained.images
    for words, folder, flags in (
        (("empty", "no images"), tmp_path / "empty", ()),
        (("nowhere",), tmp_path / "nowhere", ()),
        (("full", "not empty"), images, ("--output", "full")),
        (("full/mine.txt",), images, ("--output", "full/mine.txt")),
        (("cannot write full/mine.txt/a",), images, ("--output", "full/mine.txt/a")),
        (("lies in the folder",), images, ("--output", str(images / "out"))),
        (("--value-range", "5 5"), images, ("--value-range", "5", "5")),
        (("--neighbours", "0"), images, ("--neighbours", "0")),
        (("--groups", "at least 2"), images, ("--groups", "1")),
        (("--groups 46", "not 45"), images, ("--groups", "46")),
        (("--duplicates", "1.5"), images, ("--duplicates", "1.5")),
        (("--duplicates", "nan"), images, ("--duplicates", "nan")),
        (("--what",), images, ("--what",)),
    ):
        with user_error(*words):
            embed.main([str(run), str(folder), *flags])
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "full"}


def test_output_has_the_names_of_run_and_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(trained.run), str(trained.images), "--no-training", "--data-dir", "data"]
    embed.main(arguments)
    assert (tmp_path / "results" / "embed" / "run-images" / "images.csv").exists()
