import importlib.util
import io
import json
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
import functions
from support import datasets, figures, files, page

CLASSES = ("</script><b>cat", "dog & co", "bird")


def make_page(folder, count=60, predictions=True, labelled=True, size=8, names=None):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    features = torch.randn(count, 5, generator=draw)
    labels = np.arange(count) % 3
    coordinates = np.stack((np.arange(count) % 8, np.arange(count) // 8), 1) * 1.0
    path = folder / "embedding.html"
    page.write_page(
        path,
        coordinates,
        images,
        names,
        page.nearest(features),
        labels if labelled else None,
        CLASSES if labelled else (),
        (labels + (np.arange(count) == 7)) % 3 if predictions else None,
        "Map of <things>",
    )
    return path, images, features


def test_neighbours_are_the_nearest_by_cosine():
    features = torch.randn(2500, 6, generator=torch.Generator().manual_seed(1))
    found = page.nearest(features)
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    for i in (0, 999, 1000, 1700, 2499):
        order = [j for j in np.argsort(-(unit @ unit[i])) if j != i]
        assert found[i].tolist() == order[:5]
    assert page.nearest(features[:3]).shape == (3, 2)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 48)])
def test_the_tiles_of_the_sprite_are_the_images(channels, size):
    smooth = torch.rand(10, channels, 3, 3, generator=torch.Generator().manual_seed(0)) * 255
    images = torch.nn.functional.interpolate(smooth, (size, size), mode="bilinear").byte()
    content, columns = page.sprite(images)
    assert columns == 4
    side = min(size, 32)
    sheet = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.int64)
    assert sheet.shape == (3 * side, 4 * side, 3)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = sheet[row * side : (row + 1) * side, column * side : (column + 1) * side]
        picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        expected = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR), np.int64)
        assert abs(tile - expected).mean() < 6


def data_of(text):
    return json.loads(re.search(r"^const data = (.*);$", text, re.MULTILINE)[1])


def test_the_page_holds_the_numbers_and_names_as_text(tmp_path):
    path, _, features = make_page(tmp_path)
    text = path.read_text()
    assert text.count("<title>Map of &lt;things&gt;</title>") == 1
    assert "</script><b>cat" not in text  # or a folder's name would become a tag
    data = data_of(text)
    assert data["classes"] == list(CLASSES)
    assert data["colors"] == [color.lower() for color in figures.CLASS_COLORS[:3]]
    assert data["labels"] == [i % 3 for i in range(60)]
    assert data["points"][9] == [1, 1]
    assert [a != b for a, b in zip(data["predictions"], data["labels"], strict=True)] == [
        i == 7 for i in range(60)
    ]
    assert data["neighbours"] == page.nearest(features).tolist()
    assert "http" not in re.sub(r"<script>/\*.*?</script>", "", text, flags=re.DOTALL)


def test_ten_thousand_images_fit_into_fifteen_megabytes(tmp_path):
    path, _, _ = make_page(tmp_path, 10_000, size=32)  # noise, which compresses worst
    assert path.stat().st_size < 15e6


def point_at(browser, index):
    """Move the mouse to a point; what the panel says then."""
    from selenium.webdriver.common.action_chains import ActionChains

    x, y = browser.execute_script(
        "const layout = map._fullLayout, [x, y] = data.points[arguments[0]];"
        "const box = map.getBoundingClientRect();"
        "return [box.left + layout.xaxis._offset + layout.xaxis.d2p(x),"
        " box.top + layout.yaxis._offset + layout.yaxis.d2p(y)]",
        index,
    )
    body = browser.find_element("tag name", "body")
    corner = body.rect["width"] / 2, body.rect["height"] / 2
    mouse = ActionChains(browser)
    mouse.move_to_element_with_offset(body, int(x + 15 - corner[0]), int(y - corner[1])).perform()
    mouse.move_to_element_with_offset(body, int(x - corner[0]), int(y - corner[1])).perform()
    return panel_text(browser)


def panel_text(browser):
    before, until = None, time.monotonic() + 5
    while time.monotonic() < until:
        text = browser.find_element("id", "panel").text
        if text == before and "neighbours" in text:
            return text.splitlines()
        before = text
        time.sleep(0.2)
    return [before]


def test_in_a_browser(tmp_path, browser):
    path, _, features = make_page(tmp_path)
    browser.get(f"file://{path}")
    for index in (20, 7):
        found = point_at(browser, index)
        said = (index % 3 + (index == 7)) % 3
        near = [CLASSES[j % 3] for j in page.nearest(features)[index].tolist()]
        assert found == [
            CLASSES[index % 3],
            f"the probe says: {CLASSES[said]}",
            "nearest neighbours",
            *near,
        ]
        assert bool(browser.find_elements("css selector", "#panel .wrong")) == (index == 7)
    tile = browser.find_element("css selector", "#panel .tile")
    assert tile.value_of_css_property("background-position") == "-1120px 0px"
    # A click on a class in the legend hides it.
    browser.find_elements("css selector", ".legendtoggle")[1].click()
    time.sleep(1)
    shown = browser.execute_script("return map._fullData.map(trace => trace.visible)")
    assert shown == [True, "legendonly", True]
    # The wheel zooms.
    width = "const [a, b] = map._fullLayout.xaxis.range; return Math.abs(b - a)"
    before = browser.execute_script(width)
    from selenium.webdriver.common.action_chains import ActionChains, ScrollOrigin

    middle = ScrollOrigin.from_element(browser.find_element("id", "map"))
    ActionChains(browser).scroll_from_origin(middle, 0, -300).perform()
    time.sleep(0.5)
    assert browser.execute_script(width) < before
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_a_page_without_labels_in_a_browser(tmp_path, browser):
    path, _, _ = make_page(tmp_path, predictions=False, labelled=False)
    browser.get(f"file://{path}")
    assert point_at(browser, 12) == ["nearest neighbours"]
    assert len(browser.find_elements("css selector", "#panel .tile")) == 6


def test_the_page_shows_the_names_of_files_in_a_browser(tmp_path, browser):
    names = np.array([f"a/{i} <b>.png" for i in range(60)])
    path, _, features = make_page(tmp_path, predictions=False, labelled=False, names=names)
    browser.get(f"file://{path}")
    point_at(browser, 12)
    shown = [part.text for part in browser.find_elements("css selector", "#panel .name")]
    others = page.nearest(features)[12].tolist()
    assert shown == [f"a/{i} <b>.png" for i in (12, *others)]


# evaluation.write_map_page, which gives the page its data


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x05\x06" + bytes(18)], ids=ascii)
def test_damaged_predictions_are_one_line(tmp_path, user_error, content):
    data = functions.load_images("digits")
    (tmp_path / "predictions.npz").write_bytes(content)
    points = np.zeros((len(data.test), 2))
    with user_error(tmp_path / "predictions.npz", "damaged"):
        evaluation.write_map_page(
            tmp_path,
            data,
            evaluation.images_to_map(data),
            torch.rand(len(data.test), 4),
            points,
            "map",
        )


def test_the_map_shows_the_probes_predictions_of_its_own_images(tmp_path):
    # More images than a map takes: those of the map are a choice of them.
    count = 10_500
    numbers = torch.arange(count)
    images = (numbers % 251).byte()[:, None, None, None].repeat(1, 1, 2, 2)
    test = datasets.Split(images, numbers % 10)
    data = datasets.ImageData("numbered", tuple("0123456789"), test, test)
    files.write_arrays(tmp_path / "predictions.npz", predictions=(numbers % 7).numpy())
    index, split = evaluation.images_to_map(data)
    assert torch.equal(split.images, images[index])
    points = np.stack((index.numpy(), index.numpy()), 1)
    evaluation.write_map_page(
        tmp_path, data, evaluation.images_to_map(data), torch.rand(len(index), 2), points, "map"
    )
    found = data_of((tmp_path / "embedding.html").read_text())
    assert [point[0] for point in found["points"]] == index.tolist()
    assert found["labels"] == (index % 10).tolist()
    assert found["predictions"] == (index % 7).tolist()


def test_without_plotly_the_page_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = functions.load_images("digits")
    points = np.zeros((len(data.test), 2))
    evaluation.write_map_page(
        tmp_path, data, evaluation.images_to_map(data), torch.rand(len(data.test), 4), points, "map"
    )
    assert list(tmp_path.iterdir()) == []
    assert "pip install plotly" in capsys.readouterr().out


def test_a_folder_without_labels_has_one_class_of_images(tmp_path):
    split = datasets.Split(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), None)
    data = datasets.ImageData("flat", (), split, None)
    evaluation.write_map_page(
        tmp_path, data, evaluation.images_to_map(data), torch.rand(6, 2), np.zeros((6, 2)), "map"
    )
    found = data_of((tmp_path / "embedding.html").read_text())
    assert (found["labels"], found["labelled"], found["predictions"]) == ([0] * 6, False, None)
    assert len(found["classes"]) == len(found["colors"]) == 1


def test_a_title_that_is_no_utf8_is_spelled(tmp_path):
    split = datasets.Split(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), None)
    data = datasets.ImageData("flat", (), split, None)
    points = np.zeros((6, 2))
    mapped = evaluation.images_to_map(data)
    evaluation.write_map_page(tmp_path, data, mapped, torch.rand(6, 2), points, "caf\udce9")
    assert "caf\\udce9" in (tmp_path / "embedding.html").read_text()
