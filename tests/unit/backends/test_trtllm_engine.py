"""Folders of engines: whole or not at all, one builder at a time, listed, and pruned in order."""

import errno
import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vila2.backends import trtllm_engine
from vila2.backends.trtllm_engine import (
    EngineFolder,
    EngineSpec,
    engine_place,
    list_engines,
    prune,
    publish,
    read_engine,
)
from vila2.errors import CheckpointError, OutputError

SPEC = EngineSpec("d" * 32, "pytorch", "bf16", {"name": "G"}, {"tensorrt_llm": "1"}, {"max_batch_size": 4})
DAY = 86400.0


def make(folder: Path) -> None:
    (folder / "llm").mkdir()
    (folder / "llm" / "weights").write_bytes(b"x" * 1000)


def put(out: Path, spec: EngineSpec = SPEC, checkpoint: str = "/gone") -> EngineFolder:
    return publish(out, spec, "model", checkpoint, {"a": 1}, make)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    built = put(tmp_path / "e")
    assert read_engine(tmp_path / "e") == built
    assert names(tmp_path) == ["e"]  # no lock, nothing temporary
    assert names(tmp_path / "e") == ["engine.json", "llm"]


def test_an_equal_spec_is_found_and_another_replaces(tmp_path: Path) -> None:
    first = put(tmp_path / "e")
    assert put(tmp_path / "e") == first
    second = put(tmp_path / "e", replace(SPEC, precision="fp8"))
    assert second.created > first.created
    assert read_engine(tmp_path / "e").spec.precision == "fp8"
    assert names(tmp_path) == ["e"]


def test_places_are_readable_and_apart() -> None:
    root = Path("r")
    assert engine_place(root, "vila 1.5/3b", SPEC) == root / f"vila-1.5-3b-trtllm-bf16-{SPEC.key}"
    assert len({replace(SPEC, limits={"max_batch_size": n}).key for n in range(5)}) == 5
    assert replace(SPEC, gpu={"name": "G"}).key == SPEC.key


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no"), KeyboardInterrupt()]
)
def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    first = put(tmp_path / "e")

    def fail(folder: Path) -> None:
        make(folder)
        raise error

    kind = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind) as caught:
        publish(tmp_path / "e", replace(SPEC, precision="fp8"), "model", "c", {}, fail)
    if isinstance(error, OSError):
        assert "No space left on device; free space or choose another folder" in str(caught.value)
    assert names(tmp_path) == ["e"]
    assert read_engine(tmp_path / "e") == first


def test_leftovers_of_a_dead_builder_go_with_the_next_build(tmp_path: Path) -> None:
    (tmp_path / ".e.123.building" / "llm").mkdir(parents=True)
    put(tmp_path / "e")
    assert names(tmp_path) == ["e"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="exists and is no engine"):
        put(tmp_path / "e")
    assert names(tmp_path / "e") == ["thesis.tex"]


def _build(out: Path, log: Path) -> None:
    def slowly(folder: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        make(folder)
        time.sleep(0.5)

    publish(out, SPEC, "model", "c", {}, slowly)


def _die(out: Path) -> None:
    def half(folder: Path) -> None:
        make(folder)
        os._exit(9)

    publish(out, SPEC, "model", "c", {}, half)


def test_two_builders_of_one_engine_wait_for_one_another(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    builders = [context.Process(target=_build, args=(tmp_path / "root" / "e", log)) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
        assert builder.exitcode == 0
    assert len(log.read_text().splitlines()) == 1
    assert names(tmp_path / "root") == ["e"]


def test_a_builder_that_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    dead = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path / "e",))
    dead.start()
    dead.join(60)
    assert dead.exitcode == 9
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_engine(tmp_path / "e")
    assert list_engines(tmp_path) == []
    put(tmp_path / "e")
    assert names(tmp_path) == ["e"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is broken"),
        ("[]", "is broken"),
        ('{"backend": "native"}', "no TensorRT-LLM engine"),
        ('{"backend": "trtllm", "format": 99}', "has the format 99"),
        ('{"backend": "trtllm", "format": 1, "spec": {"x": 1}}', "is broken"),
    ],
)
def test_broken_folders_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_engine(tmp_path)


def test_the_list_says_what_is_wrong(tmp_path: Path, models: dict[str, Path]) -> None:
    here = {"tensorrt_llm": "1", "cuda": "13"}
    put(tmp_path / "fine")
    put(tmp_path / "version", replace(SPEC, versions={"tensorrt_llm": "0"}))
    put(tmp_path / "card", replace(SPEC, gpu={"name": "A100"}))
    put(tmp_path / "changed", checkpoint=str(models["vila15"]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x").write_text("1234")
    (tmp_path / "native").mkdir()
    native = {"backend": "native", "name": "n", "checkpoint": "/gone", "digest": "d", "precision": "int8"}
    (tmp_path / "native" / "engine.json").write_text(json.dumps(native))
    found = {one.path.name: one for one in list_engines(tmp_path, versions=here, gpu={"name": "G"})}
    assert {name: one.problem for name, one in found.items()} == {
        "fine": "",
        "version": "built with tensorrt_llm 0, here is 1",
        "card": "built with name A100, here is G",
        "changed": "the checkpoint has changed",
        "broken": "not whole: no readable engine.json",
        "native": "",
    }
    assert found["native"].backend == "native"
    assert found["fine"].num_bytes > 1000
    assert {one.path.name for one in list_engines(tmp_path) if one.problem} == {"changed", "broken"}
    assert list_engines(tmp_path / "none") == []


def test_pruning_goes_by_validity_age_and_size(tmp_path: Path) -> None:
    now = time.time()
    for days, name in ((1, "new"), (5, "mid"), (9, "old"), (90, "ancient")):
        put(tmp_path / name)
        file = tmp_path / name / "engine.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "created": now - 100 * DAY}))
        (tmp_path / name / "used").touch()
        os.utime(tmp_path / name / "used", (now - days * DAY,) * 2)
    (tmp_path / "broken").mkdir()
    (tmp_path / ".dead.1.building").mkdir()
    os.utime(tmp_path / ".dead.1.building", (now - 2 * DAY,) * 2)
    (tmp_path / ".young.1.building").mkdir()
    listed = list_engines(tmp_path)
    size = next(one.num_bytes for one in listed if one.path.name == "new")
    removed = prune(tmp_path, listed, max_bytes=10**9, max_age_s=30 * DAY)
    assert {one.path.name for one in removed} == {"ancient", "broken"}
    assert names(tmp_path) == [".young.1.building", "mid", "new", "old"]
    removed = prune(tmp_path, list_engines(tmp_path), max_bytes=2 * size + 50, max_age_s=30 * DAY)
    assert [one.path.name for one in removed] == ["old"]
    assert prune(tmp_path, list_engines(tmp_path), max_bytes=10**9, max_age_s=30 * DAY) == []


def test_a_cache_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(trtllm_engine, "cache_folder", homeless)
    with pytest.raises(OutputError, match="set XDG_CACHE_HOME"):
        trtllm_engine.engines_root()
