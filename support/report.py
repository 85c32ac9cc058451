"""`report.html`: a run on one page, with its numbers, settings and pictures, in a single file."""

from __future__ import annotations

import base64
import dataclasses
import html
import shlex
from pathlib import Path
from typing import Any

from support import files, progress, settings

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: 0.15em 1.2em 0.15em 0; text-align: left; }
tr { border-bottom: 1px solid #ddd; } pre { background: #f4f4f4; padding: 0.8em; }
pre { white-space: pre-wrap; } figure { margin: 1.5em 0; } img { max-width: 100%; }
figcaption, .about { color: #555; } .light { font-size: 1.6em; vertical-align: -0.1em; }
.good { color: #2a8a3e; } .doubtful { color: #d9a400; } .bad { color: #c62828; }
"""


def write_report(folder: Path, config_class: Any) -> None:
    """Write `report.html` of a run folder, from the files that are in it.

    It holds the numbers of `summary.json` (or of a sweep's `best.json`), the settings that differ
    from the defaults, the command that repeats the run, and all its pictures.

    Args:
        folder: of the run; needs `config.json`.
        config_class: of its script, whose defaults are meant.

    Raises:
        UserError: a file of the run is damaged, or the report cannot be written.
    """
    record = files.read_json(folder / "config.json")
    script = config_class.SCRIPT
    about = [str(record.get(name)) for name in ("started", "hardware", "computed_in")]
    commit = record.get("commit")
    numbers = number_rows(folder)
    parts = [
        f"<h1>{html.escape(script)}: {html.escape(folder.name)}</h1>",
        f'<p class="about">{html.escape(", ".join(about))}, commit {html.escape(str(commit))}</p>',
        *_traffic_light(dict(numbers).get("verdict", "")),
        "<h2>Numbers</h2>",
        _table(numbers),
        "<h2>Settings that differ from the defaults</h2>",
        _table(changed_rows(record, config_class)),
        "<h2>The command that repeats it</h2>",
        f"<pre>{html.escape(shlex.join(command_of(record, config_class)))}</pre>",
        "<h2>Pictures</h2>",
    ]
    for path in sorted(folder.glob("*.png")):
        picture = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.name)
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{picture}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    title = html.escape(f"{script}: {folder.name}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )
    with files.atomic_file(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def number_rows(folder: Path) -> list[tuple[str, str]]:
    """The names and values of the run's results, accuracies in per cent, times in words."""
    found = [folder / name for name in ("summary.json", "best.json")]
    values = {k: v for path in found if path.exists() for k, v in files.read_json(path).items()}
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            inner = [f"{key} {_shown(name, each)}" for key, each in value.items()]
            rows.append((name, ", ".join(inner)))
        else:
            rows.append((name, _shown(name, value)))
    return rows


def changed_rows(record: dict[str, Any], config_class: Any) -> list[tuple[str, str]]:
    """The flags of a run that are not the script's defaults, with what the default is."""
    flags = settings.changed_flags(record, config_class)
    fields = dataclasses.fields(config_class)
    defaults = {settings.flag(field.name): field.default for field in fields}
    rows = []
    for name, words in flags.items():
        default = defaults[name]
        shown = "unset" if default is None else default
        given = words if not words[0].startswith("--") else words[1:] or words
        rows.append((name, f"{' '.join(given)} (default: {shown})"))
    return rows


def command_of(record: dict[str, Any], config_class: Any) -> list[str]:
    """The words of the command that repeats a run, but for its name and where it is kept."""
    flags = settings.changed_flags(record, config_class)
    return ["python", f"{config_class.SCRIPT}.py", *(w for words in flags.values() for w in words)]


def _traffic_light(verdict: str) -> list[str]:
    """A green, yellow or red dot before a verdict that begins with good, doubtful or bad."""
    light = verdict.partition(":")[0]
    if light not in ("good", "doubtful", "bad"):  # a run without a verdict
        return []
    return [f'<p><span class="light {light}">●</span> {html.escape(verdict)}</p>']


def _shown(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if "seconds" in name:
        return progress.format_seconds(value)
    return f"{value:.1%}" if "accuracy" in name else f"{value:.4g}"


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows]
    return f"<table>{''.join(cells)}</table>" if rows else "<p>none</p>"
