import base64
import dataclasses
import io
import json
import shlex
from html.parser import HTMLParser

import pytest
from PIL import Image

from support import report, settings


@dataclasses.dataclass(frozen=True)
class Config(settings.TrainingConfig, batch_size=8):
    SCRIPT = "script"

    speed: str = settings.setting("slow & <safe>", "run", "a setting")
    careful: bool = settings.setting(True, "run", "another")


class Page(HTMLParser):
    """The rows of the tables, the texts in <pre>, and the pictures by their names."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.commands, self.pictures, self.links = {}, [], {}, []
        self.tag, self.row = "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag, values = tag, dict(attributes)
        self.links += [v for k, v in values.items() if k in ("src", "href") and "data:" not in v]
        if tag == "img":
            content = base64.b64decode(values["src"].removeprefix("data:image/png;base64,"))
            self.pictures[values["alt"]] = Image.open(io.BytesIO(content)).size

    def handle_data(self, data):
        if self.tag == "th":
            self.row = data
        elif self.tag == "td":
            self.rows[self.row] = data
        elif self.tag == "pre" and data.strip():
            self.commands.append(data)

    def handle_endtag(self, tag):
        self.tag = ""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run $1 <b>"
    folder.mkdir()
    config = Config(epochs=7, speed="a 'b' <c>", careful=False, name="x", output_dir="elsewhere")
    record = {"script": "script", **dataclasses.asdict(config), "hardware": "A <fast> CPU"}
    record |= {"computed_in": "bf16-mixed", "commit": "abc", "started": "today"}
    (folder / "config.json").write_text(json.dumps(record))
    summary = {"test_accuracy": 0.8768, "final_loss": 1.23456, "seconds": 75.0, "epochs": 7}
    summary["per_class_accuracy"] = {"<i>": 0.5, "b": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    for name, size in (("loss.png", (8, 4)), ("a <b>.png", (3, 5))):
        Image.new("RGB", size).save(folder / name)
    return folder


def test_a_report_holds_numbers_settings_command_and_pictures(folder):
    report.write_report(folder, Config)
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.rows == {
        "test_accuracy": "87.7%",
        "final_loss": "1.235",
        "seconds": "1m15s",
        "epochs": "7",
        "per_class_accuracy": "<i> 50.0%, b 100.0%",
        "--epochs": "7 (default: 100)",
        "--speed": "a 'b' <c> (default: slow & <safe>)",
        "--careful": "--no-careful (default: True)",
        "--precision": "bfloat16 (default: auto)",
    }
    (command,) = page.commands
    words = shlex.split(command)
    assert words[:2] == ["python", "script.py"]
    again = settings.parse_config(Config, words[2:], "")
    assert (again.epochs, again.speed, again.careful) == (7, "a 'b' <c>", False)
    assert (again.name, again.output_dir) == (None, "results")  # where it lies is no part of it
    assert page.pictures == {"loss.png": (8, 4), "a <b>.png": (3, 5)}
    assert page.links == []  # nothing outside the file
    assert "<script" not in text


def test_a_report_in_a_browser(folder, browser):
    report.write_report(folder, Config)
    browser.get((folder / "report.html").as_uri())
    widths = "return [...document.images].map(image => [image.alt, image.naturalWidth])"
    assert dict(browser.execute_script(widths)) == {"loss.png": 8, "a <b>.png": 3}
    shown = browser.find_element("tag name", "table")
    assert shown.is_displayed()
    assert "test_accuracy 87.7%" in shown.text
    edges = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, wide = browser.execute_script(edges)
    assert scrolled <= wide  # nothing is cut off at the right
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert [url for url in asked if url.startswith("file:")] == [(folder / "report.html").as_uri()]
    assert browser.get_log("browser") == []


def test_a_damaged_run_is_one_line(folder, user_error):
    (folder / "summary.json").write_text("{")
    with user_error("summary.json", "damaged"):
        report.write_report(folder, Config)
