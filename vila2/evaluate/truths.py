"""The truth of scenes that `vila2-fast world make` wrote: the .json beside each image, in tars or as files."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vila2.errors import UsageError
from vila2.world.scene import Background, Object, Scene, Sign


def read_truths(source: str | Path) -> dict[str, Scene]:
    """key -> scene, of a folder of tars, one tar, or a folder of files. UsageError where there is no truth."""
    source = Path(source).expanduser()
    if not source.exists():
        raise UsageError(f"{source} is not there: name the folder that `vila2-fast world make` wrote")
    truths = {key: _parse(data, where) for where, key, data in _json_members(source)}
    if not truths:
        raise UsageError(
            f"{source} holds no truth of scenes: `vila2-fast world make` writes it beside its images"
        )
    return truths


def scene_of(truth: dict[str, Any]) -> Scene:
    """What `Scene.truth()` gave, as a scene again, but for its background's looks. KeyError or TypeError if not."""
    things = [Object(**{**thing, "box": tuple(thing["box"])}) for thing in truth["objects"]]
    sign = truth["sign"] and Sign(**{**truth["sign"], "box": tuple(truth["sign"]["box"])})
    backdrop = Background("scenery", truth["background"])  # its phrase is then the recorded one
    themes = tuple(truth.get("themes", ()))
    return Scene(
        truth["seed"], truth["split"], truth["index"], truth["style"], tuple(things), sign, backdrop, themes
    )


def _parse(data: bytes, where: str) -> Scene:
    try:
        return scene_of(json.loads(data))
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{where} holds no truth of a scene") from None


def _json_members(source: Path) -> Iterator[tuple[str, str, bytes]]:
    """(where, key, content) of each .json that may be a sample's; keys as the sources of `vila2.data` have them."""
    if source.is_file():
        yield from _of_tar(source)
        return
    tars = sorted(source.rglob("*.tar"))
    for tar in tars:
        yield from _of_tar(tar)
    if not tars:
        for path in sorted(source.rglob("*.json")):
            if any(path.with_suffix(suffix).exists() for suffix in (".jpg", ".png")):
                yield str(path), path.relative_to(source).with_suffix("").as_posix(), path.read_bytes()


def _of_tar(path: Path) -> Iterator[tuple[str, str, bytes]]:
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                content = tar.extractfile(member) if extension == "json" else None
                if content is not None:
                    yield f"{path}: {member.name}", f"{folder}/{stem}" if folder else stem, content.read()
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"{path}: cannot read the tar: {error}") from None
