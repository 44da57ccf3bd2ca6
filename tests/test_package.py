"""What a user meets first: the version, the recipes, the example images, and documents that do not lie."""

import re
from collections.abc import Iterator
from importlib.metadata import distribution, version
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

import vila2
from vila2.config import load_recipe, recaption_settings
from vila2.data.reading import IMAGE_EXTENSIONS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(ROOT.glob("*.md"))
IMAGES = [p for p in sorted((ROOT / "examples" / "images").iterdir()) if p.suffix not in (".txt", ".md")]


def document_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_version_is_the_installed_one() -> None:
    assert vila2.__version__ == version("vila2-fast")


def test_command_is_installed() -> None:
    points = {point.name: point.value for point in distribution("vila2-fast").entry_points}
    assert points["vila2-fast"] == "vila2.cli.main:main"


def test_types_travel_with_the_package() -> None:
    assert files("vila2").joinpath("py.typed").is_file()


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = vila2.nonsense


# Recipes


@pytest.mark.parametrize("name", ["recaption.toml", "several_prompts.yaml"])
def test_recipe_is_valid(name: str) -> None:
    settings = recaption_settings(ROOT / "recipes" / name, {"source": "a", "model": "b", "out": "c"})
    assert settings.prompt


def test_prompt_file_is_valid() -> None:
    from vila2.recaption.prompts import make_prompts

    wordings = {
        name: prompt["texts"] for name, prompt in load_recipe(ROOT / "recipes" / "prompts.toml").items()
    }
    assert make_prompts(wordings, seed=0).fields == {"original"}


# Examples


@pytest.mark.parametrize("path", IMAGES, ids=document_id)
def test_example_image_is_small_readable_and_licensed(path: Path) -> None:
    assert path.suffix.removeprefix(".") in IMAGE_EXTENSIONS
    assert path.stat().st_size <= 60_000
    with Image.open(path) as image:
        image.load()
        assert max(image.size) <= 480
    assert f"`{path.name}`" in (path.parent / "LICENSES.md").read_text(encoding="utf-8")


def test_examples_have_several_formats() -> None:
    assert 8 <= len(IMAGES) <= 12
    assert {".jpg", ".png", ".webp", ".gif"} <= {p.suffix for p in IMAGES}


# Documents


def code_blocks(text: str) -> Iterator[str]:
    yield from re.findall(r"```(?:bash|console|sh)\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_files_and_targets_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(
        re.findall(r"\bmake ([a-z0-9-]+)\b", " ".join([*code_blocks(text), *re.findall(r"`[^`\n]+`", text)]))
    )
    assert named <= targets, f"{path.name} names make targets that do not exist: {sorted(named - targets)}"
    for name in re.findall(r"`((?:vila2|bench|tests|csrc|kernels|recipes|examples)/[\w./-]*\w)`", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_options_exist(path: Path) -> None:
    from vila2.cli.main import COMMANDS, cli

    text = path.read_text(encoding="utf-8")
    group = cli.make_context("vila2-fast", [], resilient_parsing=True)
    for line in re.findall(r"vila2-fast (.*)", text.replace("\\\n", " ")):
        name = line.split()[0].strip("`")
        if name not in COMMANDS:
            continue
        command = cli.get_command(group, name)
        assert command is not None
        known = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line.split("`")[0]))
        assert used <= known | {"--help"}, f"{path.name}: vila2-fast {name} has no {sorted(used - known)}"


def test_readme_names_only_extras_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {e.strip() for found in re.findall(r"vila2-fast\[([\w, ]+)\]", text) for e in found.split(",")}
    assert named
    assert named <= set(distribution("vila2-fast").metadata.get_all("Provides-Extra") or [])


def test_tables_of_benchmarks_come_from_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import tables

    path = ROOT / "BENCHMARKS.md"
    text = path.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run `python bench/tables.py BENCHMARKS.md`"


def test_readme_names_every_error_kind_and_column() -> None:
    from vila2.types import ErrorKind, Status

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for word in [*(kind.value for kind in ErrorKind), *(status.value for status in Status)]:
        assert f"`{word}`" in text, f"README.md does not name {word}"
