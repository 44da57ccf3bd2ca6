"""Where drafts come from: the sample, one of its columns, or an earlier run, matched by place, key and prompt."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.recaption.fakes import FakeCaptioner, echo, say
from vila2.config import RecaptionSettings, make_settings
from vila2.data.manifest import Manifest
from vila2.data.rows import Row
from vila2.data.writer import PartWriter
from vila2.errors import OutputError, UsageError
from vila2.recaption.drafts import EarlierRun, open_drafts, with_drafts
from vila2.recaption.exchange import Exchange
from vila2.recaption.feed import Feed, Job, Loaded
from vila2.recaption.prompts import make_prompts
from vila2.recaption.stats import DraftUse
from vila2.types import CaptionRequest, ErrorKind, FinishReason, Sample, SampleError, Status

PROMPTS = make_prompts({"brief": ("Say it.",), "ocr": ("Read it.",)}, seed=0)


def make(tmp_path: Path, **values: object) -> RecaptionSettings:
    return make_settings(RecaptionSettings, {"source": "s", "out": str(tmp_path / "new"), **values})


def row(key: str, shard: str, index: int, prompt: str, caption: str, **more: object) -> Row:
    return Row(key, shard, index, prompt, Status.OK, "digest", caption, **more)  # type: ignore[arg-type]


def write_run(
    out: Path, rows: list[Row], rows_per_part: int = 3, prompts: tuple[str, ...] = ("brief", "ocr")
) -> Path:
    settings = {
        "prompts": {name: ["Say."] for name in prompts},
        "seed": 0,
        "prompt_template": None,
        "source": "folder:/nowhere",
    }
    Manifest(settings).ensure(out)
    writer = PartWriter(out, rows_per_part=rows_per_part)
    for one in rows:
        writer.add(one)
    writer.flush()
    return out


def sample(key: str = "k", shard: str = "a", index: int = 0, **more: object) -> Sample:
    return Sample(shard, index, key, b"", **more)  # type: ignore[arg-type]


def test_the_original_a_column_or_nothing(tmp_path):
    one = sample(original="an old one", fields={"blip": "another"})
    jobs = [Job(one, ("brief", "ocr")), Job(sample(), ("ocr",))]

    def drafted(**values: object) -> list[dict[str, str]]:
        drafts = open_drafts(make(tmp_path, **values), PROMPTS)
        return [dict(job.drafts) for job in with_drafts(jobs, drafts)]

    assert drafted(draft="original") == [{"brief": "an old one", "ocr": "an old one"}, {"ocr": ""}]
    assert drafted(draft="column:blip") == [{"brief": "another", "ocr": "another"}, {"ocr": ""}]
    # Alt-texts of the web resemble no caption; what a round found there, it may have been written by a model.
    assert drafted() == drafted(round=1) == drafted(draft="off", round=3) == [{}, {}]
    assert drafted(round=2) == drafted(draft="original")


def test_a_column_that_the_first_sample_lacks_is_a_typo(tmp_path):
    drafts = open_drafts(make(tmp_path, draft="column:blib"), PROMPTS)
    assert drafts is not None
    with pytest.raises(UsageError, match=r"no such column.*'blip'.*it has: blip, index"):
        drafts.of(sample(fields={"blip": "x"}), "brief")


def test_a_sample_without_an_image_gets_none(tmp_path):
    bad = replace(sample(), image=None, error=SampleError(ErrorKind.EMPTY_FILE, "empty"))
    [job] = with_drafts([Job(bad, ("brief",))], open_drafts(make(tmp_path, draft="column:x"), PROMPTS))
    assert job.drafts == {}


def test_captions_of_an_earlier_run_are_found_by_place_and_by_key(tmp_path):
    rows = [row(f"k{i}", "a", i, prompt, f"{prompt} {i}") for i in range(10) for prompt in ("brief", "ocr")]
    rows += [row("twin", shard, 0, "brief", f"twin in {shard}") for shard in ("b", "c")]
    rows.append(
        Row("bad", "d", 0, "brief", Status.ERROR, "digest", error_kind=ErrorKind.EMPTY_FILE, error="empty")
    )
    run = EarlierRun(write_run(tmp_path / "old", rows), PROMPTS.names)
    for i in (9, 0, 5, 4, 9):
        assert run.of(sample(f"k{i}", "a", i), "ocr") == f"ocr {i}"
    assert run.of(sample("k3", "moved.tar", 77), "brief") == "brief 3"
    assert run.of(sample("twin", "c", 0), "brief") == "twin in c"
    assert run.of(sample("twin", "e", 0), "brief") in ("twin in b", "twin in c")
    # The place is another sample's now: its key says so.
    assert run.of(sample("k7", "a", 2), "brief") == "brief 7"
    for nobody in (sample("k11", "a", 3), sample("bad", "d", 0)):
        assert run.of(nobody, "brief") == ""
    assert run.of(sample("k1", "a", 1), "detailed") == ""


def test_a_run_with_nothing_in_it_has_no_drafts(tmp_path):
    assert EarlierRun(write_run(tmp_path / "old", []), PROMPTS.names).of(sample(), "brief") == ""


def test_what_cannot_be_drafted_from_is_one_line(tmp_path):
    old = write_run(tmp_path / "old", [row("k", "a", 0, "detailed", "x")], prompts=("detailed",))
    for draft, words in (
        (str(tmp_path / "missing"), ["off, auto, original", "missing"]),
        (str(tmp_path), ["manifest.json"]),
        (str(tmp_path / "new"), ["where the new captions go"]),
        (str(old), ["no captions of brief, ocr", "but of detailed"]),
    ):
        with pytest.raises(UsageError) as caught:
            open_drafts(make(tmp_path, draft=draft), PROMPTS)
        assert all(word in str(caught.value) for word in words), caught.value
    for draft in ("", "column:", " "):
        with pytest.raises(UsageError, match="must be off, auto"):
            make(tmp_path, draft=draft)


def test_a_broken_part_is_named(tmp_path):
    run = EarlierRun(write_run(tmp_path / "old", [row("k", "a", 0, "brief", "x")]), PROMPTS.names)
    [part] = (tmp_path / "old" / "parts").iterdir()
    part.write_bytes(b"gone")
    with pytest.raises(OutputError, match=part.name):
        run.of(sample("k", "a", 0), "brief")


def test_requests_carry_the_draft_through_retries(tmp_path):
    settings = make(tmp_path, draft="original")
    jobs = with_drafts([Job(sample(original="an old one"), ("brief", "ocr"))], open_drafts(settings, PROMPTS))
    feed = Feed(jobs, lambda job: Loaded(job, 1), workers=1)

    def loops_once(request: CaptionRequest) -> object:
        first = request.sampling.temperature == 0
        return say("x", FinishReason.REPETITION)(request) if first else echo(request)

    captioner = FakeCaptioner(loops_once)  # type: ignore[arg-type]
    exchange = Exchange(
        feed, PROMPTS, settings, emit=lambda _: None, tick=lambda: None, stop_requested=lambda: False
    )
    for caption in captioner.caption(exchange.requests()):
        exchange.settle(caption)
    assert len(captioner.requests) == 4
    assert {request.draft for request in captioner.requests} == {"an old one"}


def test_use_is_read_from_the_counters_that_there_are():
    assert DraftUse.of({}) == DraftUse(0, 0, 1.0)
    stats = {"drafted_tokens": 10.0, "accepted_tokens": 6, "new_tokens": 9, "sequence_steps": 3}
    assert DraftUse.of(stats) == DraftUse(10, 6, 3.0)
