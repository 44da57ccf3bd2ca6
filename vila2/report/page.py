"""One HTML file a loop: it needs no network, runs from a file, and shows nothing of the data as anything but text.

All data stand in one JSON block in which no `<` remains, and the page's script puts them into the document as text
nodes. A policy in the page forbids it every request.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from vila2.augment.results import Results
from vila2.data.files import atomic_write, write_error
from vila2.report.gallery import gallery

_DATA = "/*DATA*/null"
_SCRIPT = "/*SCRIPT*/"


def write_page(path: Path, results: Results, images: int = 60) -> None:
    """Write the page, whole or not at all. OutputError if it cannot be written."""
    html = page(page_data(results, images))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, html.encode())
    except OSError as error:
        raise write_error(path, error) from error


def page(data: dict[str, Any]) -> str:
    """The page with its data in place."""
    folder = files("vila2.report")
    template = (folder / "page.html").read_text(encoding="utf-8")
    assert template.count(_DATA) == template.count(_SCRIPT) == 1
    # The data last: nothing is looked for in them.
    script = (folder / "page.js").read_text(encoding="utf-8")
    return template.replace(_SCRIPT, script).replace(_DATA, embedded(data))


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element: whatever a caption holds, it cannot end that element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page_data(results: Results, images: int) -> dict[str, Any]:
    """What the page's script reads."""
    values = results.to_json()
    values["gallery"] = [shown.to_json() for shown in gallery(Path(results.out), results, images)]
    return values
