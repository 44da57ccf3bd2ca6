"""The TensorRT-LLM adapter against the stand-in, for each generation: the same captions as our own engine."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trtllm_standin import runtime
from vila2.backends import open_captioner
from vila2.backends.native import open_checkpoint
from vila2.backends.trtllm import TrtllmCaptioner, end_tokens
from vila2.backends.trtllm_build import build
from vila2.backends.trtllm_engine import read_engine
from vila2.config import RecaptionSettings, make_settings
from vila2.engine.repetition import find_loop_reference
from vila2.errors import CheckpointError, UsageError, VilaError
from vila2.types import Caption, CaptionRequest, ErrorKind, FinishReason, RepetitionRule, SamplingParams

GREEDY = SamplingParams(max_new_tokens=8)


def settings_for(model: Path, **values: Any) -> RecaptionSettings:
    base = {"source": "s", "out": "o", "backend": "trtllm", "batch_size": 4}
    if "engine" not in values:
        base["model"] = str(model)
    return make_settings(RecaptionSettings, {**base, **values})


def pixels(seed: int, size: tuple[int, int] = (40, 60)) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def requests_of(
    captioner: Any, count: int, prompts: int = 1, sampling: SamplingParams = GREEDY
) -> Iterator[CaptionRequest | None]:
    for i in range(count):
        prepared = captioner.prepare(pixels(i))
        for n in range(prompts):
            text = f"Describe it {n}."
            number = i * prompts + n
            yield CaptionRequest(number, text, (prepared,), sampling, ("s", i), prompts, rng_key=number)
        if i % 3 == 2:
            yield None


def run(captioner: Any, *args: Any, **kwargs: Any) -> list[Caption]:
    found = {caption.id: caption for caption in captioner.caption(requests_of(captioner, *args, **kwargs))}
    return [found[i] for i in sorted(found)]


@pytest.mark.parametrize("kind", ["vila15", "nvila"])
def test_the_same_captions_as_the_native_engine(version: str, models: dict[str, Path], kind: str) -> None:
    sampling = SamplingParams(max_new_tokens=10, repetition=RepetitionRule(4, 3, 6))
    captioner = open_captioner(settings_for(models[kind]))
    ours = run(captioner, 5, 2, sampling)
    stats = captioner.stats()
    captioner.close()
    native = open_checkpoint(models[kind], device="cpu", precision="float32", threads=1)
    theirs = run(native, 5, 2, sampling)
    assert ours == theirs
    assert len({caption.text for caption in ours}) > 5
    assert captioner.model_digest == native.model_digest
    assert (stats["images_encoded"], stats["images_shared"], stats["in_flight"]) == (5, 5, 0)
    way = "attached" if version == "1.2.1" else "preprocessed"
    assert runtime.log.count(way) == 10
    generation = "pytorch" if version == "1.3.0rc25" else "engine"
    assert f"open {generation}" in runtime.log
    assert runtime.log[-1] == "shutdown"
    assert version in captioner.description


def test_an_engine_is_built_once_and_then_found(version: str, models: dict[str, Path], cache: Path) -> None:
    stages: list[str] = []
    first = build(models["vila15"], max_batch=4, observe=stages.append)
    built = list(runtime.log)
    again = build(models["vila15"], max_batch=4)
    assert runtime.log == built
    assert first.path == again.path
    assert first.path.parent == cache / "engines"
    assert first.path.name.startswith("vila15-trtllm-bf16-")
    assert stages[1] == "loading the checkpoint"
    here = {path.name for path in first.path.iterdir()}
    common = {"engine.json", "tokenizer", "vision.safetensors"}
    assert here == common | ({"model", "cache"} if version == "1.3.0rc25" else {"llm"})
    spec = read_engine(first.path).spec
    image_tokens = spec.limits["max_multimodal_len"] // 4
    assert spec.limits["max_input_len"] == image_tokens + 256
    assert spec.versions["tensorrt_llm"] == version
    other = build(models["vila15"], max_batch=8)
    assert other.path != first.path


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"max_batch": 5}, True),
        ({"max_new_tokens": 512}, True),
        ({"options": ("max_num_tokens=9000",)}, True),
        ({}, False),
    ],
)
def test_what_an_engine_is_known_by(
    newest: str, models: dict[str, Path], change: dict[str, Any], differs: bool
) -> None:
    first = build(models["vila15"], max_batch=4)
    second = build(models["vila15"], **{"max_batch": 4, **change})
    assert (first.spec.key != second.spec.key) is differs
    keys = {first.spec.key}
    for field, value in (
        ("digest", "x"), ("generation", "x"), ("precision", "fp8"), ("gpu", {}), ("versions", {}), ("calibration", "x"),
    ):  # fmt: skip
        keys.add(replace(first.spec, **{field: value}).key)
    assert len(keys) == 7


def test_a_request_that_fails_is_a_row_and_its_neighbours_are_fine(
    version: str, models: dict[str, Path]
) -> None:
    captioner = open_captioner(settings_for(models["vila15"], request_timeout=5))
    fine = run(captioner, 6)
    offset = captioner.llm._runtime._number  # type: ignore[attr-defined]
    what = {1: "request_error", 2: "cancelled", 3: "timeout", 4: "empty"}
    runtime.faults = lambda number: what.get(number - offset, "")
    found = run(captioner, 6)
    captioner.close()
    assert [found[i] for i in (0, 5)] == [fine[i] for i in (0, 5)]
    messages = ["RequestError: the request failed: bad logits", "cancelled", "timeout", "no output"]
    for i, message in enumerate(messages, 1):
        error = found[i].error
        assert error is not None
        assert error.kind is ErrorKind.ENGINE_ERROR
        assert message in error.message


def test_a_worker_that_dies_ends_the_run_with_one_line(version: str, models: dict[str, Path]) -> None:
    captioner = open_captioner(settings_for(models["vila15"]))
    runtime.faults = lambda number: "die" if number == 3 else ""
    with pytest.raises(
        VilaError, match=r"worker failed: RuntimeError: MPI worker exited.*same command again"
    ):
        run(captioner, 12)
    with pytest.raises(VilaError, match="worker failed"):
        run(captioner, 2)
    captioner.close()


def test_a_worker_that_hangs_is_told_from_a_request_that_does(version: str, models: dict[str, Path]) -> None:
    captioner = open_captioner(settings_for(models["vila15"], request_timeout=3))
    offset = captioner.llm._runtime._number  # type: ignore[attr-defined]
    runtime.faults = lambda number: "hang" if number == offset + 2 else ""
    found = run(captioner, 5)
    assert found[2].error is not None
    assert "no answer within 3 s" in found[2].error.message
    assert [caption.error for i, caption in enumerate(found) if i != 2] == [None] * 4
    assert f"abort {offset + 2}" in runtime.log
    captioner.timeout_s = 0.2  # type: ignore[attr-defined]
    runtime.faults = lambda number: "hang"
    with pytest.raises(VilaError, match="answered none of 8 requests"):
        run(captioner, 20)
    captioner.close()


def test_the_window_is_bounded(newest: str, models: dict[str, Path]) -> None:
    captioner = open_captioner(settings_for(models["vila15"], batch_size=2))
    runtime.faults = lambda number: "hang"
    pulled = 0

    def endless() -> Iterator[CaptionRequest]:
        nonlocal pulled
        while True:
            pulled += 1
            yield CaptionRequest(pulled, "x", (captioner.prepare(pixels(0)),), GREEDY)

    captioner.timeout_s = 0.5  # type: ignore[attr-defined]
    assert next(captioner.caption(endless())).error is not None
    assert pulled == 3
    captioner.close()


def test_prompts_that_do_not_fit_are_rows(version: str, models: dict[str, Path]) -> None:
    captioner = open_captioner(settings_for(models["vila15"]))
    image = captioner.prepare(pixels(0))
    texts = ["word " * 2000, "<image> <image>", "fine", "no image"]
    requests = [CaptionRequest(i, text, (image,) if i < 3 else (), GREEDY) for i, text in enumerate(texts)]
    found = {caption.id: caption for caption in captioner.caption(requests)}
    captioner.close()
    assert found[0].error is not None
    assert found[0].error.kind is ErrorKind.PROMPT_TOO_LONG
    assert found[1].error is not None
    assert found[1].error.kind is ErrorKind.BAD_PROMPT
    assert found[2].error is None
    assert found[3].error is None


def test_sampling_samples_and_the_seed_decides(newest: str, models: dict[str, Path]) -> None:
    captioner = open_captioner(settings_for(models["vila15"]))
    hot = SamplingParams(temperature=2.0, max_new_tokens=8)
    one, two = run(captioner, 4, sampling=hot), run(captioner, 4, sampling=hot)
    greedy = run(captioner, 4)
    captioner.close()
    assert one == two  # keyed by the sample
    assert [a.text for a in one] != [a.text for a in greedy]


# ---- refusals ----


def test_settings_that_this_version_does_not_know(version: str, models: dict[str, Path], cache: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no setting 'max_batchsize' .did you mean 'max_batch_size'.*accepts: .*dtype"
    ):
        build(models["vila15"], options=("max_batchsize=4",))
    with pytest.raises(UsageError, match="vila2-fast's own to choose"):
        build(models["vila15"], options=('kv_cache_config={"enable_block_reuse": true}',))
    with pytest.raises(UsageError, match="expected NAME=VALUE"):
        build(models["vila15"], options=("max_seq_len",))
    newer = ("encode_only=true",)
    if version == "1.2.1":
        with pytest.raises(UsageError, match="no setting 'encode_only'"):
            build(models["vila15"], options=newer)
    assert not (cache / "engines").exists()


def test_a_package_that_is_not_there(models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="needs the package tensorrt_llm"):
        open_captioner(settings_for(models["vila15"]))


def test_telemetry_is_off_before_anything_starts(newest: str) -> None:
    from vila2.backends.trtllm_api import load_api

    load_api()
    assert os.environ["TRTLLM_NO_USAGE_STATS"] == os.environ["DO_NOT_TRACK"] == "1"


def test_an_engine_of_something_else_is_refused(
    version: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(models["vila15"], model)
    engine = build(model, tmp_path / "engine", max_batch=4)
    given = settings_for(model, engine=str(engine.path))
    opened = open_captioner(given)
    assert len(run(opened, 2)) == 2
    opened.close()
    assert (engine.path / "used").exists()
    with monkeypatch.context() as context:
        context.setattr("vila2.backends.trtllm.this_gpu", lambda: {"name": "H200", "capability": "9.0"})
        with pytest.raises(
            CheckpointError, match="built with the GPU none, here is H200; build it again: vila2-fast"
        ):
            open_captioner(given)
    with monkeypatch.context() as context:
        import tensorrt_llm

        context.setattr(tensorrt_llm, "__version__", "9.9")
        with pytest.raises(CheckpointError, match=r"tensorrt_llm .*, here is 9.9"):
            open_captioner(given)
    config = model / "llm" / "generation_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"is stale: the checkpoint .* has changed since"):
        open_captioner(given)
    (engine.path / "vision.safetensors").write_bytes(b"short")
    shutil.rmtree(model)
    with pytest.raises(CheckpointError, match="build it again"):
        open_captioner(given)
    (engine.path / "engine.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_captioner(given)
    with pytest.raises(UsageError, match="it has no readable"):
        settings_for(model, engine=str(engine.path))


def test_an_engine_that_does_not_start(version: str, models: dict[str, Path], cache: Path) -> None:
    runtime.faults = lambda number: "start" if number == -1 else ""
    with pytest.raises(VilaError, match=r"TensorRT-LLM did not (start|build): RuntimeError: CUDA error"):
        open_captioner(settings_for(models["vila15"]))
    assert not list((cache / "engines").iterdir())
    runtime.faults = None
    open_captioner(settings_for(models["vila15"])).close()


# ---- where a caption ends ----


@pytest.mark.parametrize(
    ("tokens", "sampling", "ended"),
    [
        ([5, 6, 2], SamplingParams(), ([5, 6], FinishReason.STOP)),
        ([5, 6, 7], SamplingParams(), ([5, 6, 7], FinishReason.LENGTH)),
        ([5, 2, 7], SamplingParams(ignore_eos=True), ([5, 2, 7], FinishReason.LENGTH)),
        ([5, 6, 7, 8], SamplingParams(stop=("6 7",)), ([5, 6, 7], FinishReason.STOP)),
        ([5, 6, 7, 8], SamplingParams(stop=("6",), min_new_tokens=4), ([5, 6, 7, 8], FinishReason.STOP)),
        ([1, 3] * 9, SamplingParams(repetition=RepetitionRule(4, 3, 6)), ([1, 3], FinishReason.REPETITION)),
        ([], SamplingParams(), ([], FinishReason.LENGTH)),
    ],
)
def test_ends(tokens: list[int], sampling: SamplingParams, ended: tuple[list[int], FinishReason]) -> None:
    def decode(ids: Any) -> str:
        return " ".join(str(token) for token in ids)

    found, reason = end_tokens(tokens, sampling, frozenset({2}), decode, FinishReason.LENGTH)
    assert (list(found), reason) == ended
    if sampling.repetition:
        assert find_loop_reference([1, 3] * 3, sampling.repetition) == 4


def test_the_captioner_is_what_the_registry_names(newest: str, models: dict[str, Path]) -> None:
    captioner = open_captioner(settings_for(models["vila15"]))
    assert isinstance(captioner, TrtllmCaptioner)
    captioner.close()
    captioner.close()
