"""The recaption command against servers on this machine: rows, resumption, deaths, and the line that ends a run."""

import hashlib
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e import harness, sources
from tests.e2e.harness import start, vila2_fast
from tests.unit.backends.faulty_server import Asked, Fault, FaultyServer, completion, running

COUNT = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.write_folder(tmp_path_factory.mktemp("photos") / "photos", COUNT)


def answer(asked: Asked) -> dict[str, object]:
    """Depends on the pixels that came and on the prompt."""
    return completion(f"{len(asked.text)} {hashlib.sha256(asked.image).hexdigest()[:10]}.")


class Job:
    def __init__(self, tmp: Path, photos: Path, *servers: FaultyServer) -> None:
        self.tmp, self.out = tmp, tmp / "out"
        self.arguments = [
            "recaption",
            str(photos),
            "--backend",
            "http",
            "--model",
            "m",
            "--out",
            str(self.out),
        ]
        self.arguments += ["--prompt", "brief", "--prompt", "detailed", "--api-key-env", "NO_SUCH_KEY"]
        for server in servers:
            self.arguments += ["--base-url", server.url]

    def run(self, *more: str) -> harness.Done:
        return vila2_fast(self.tmp, *self.arguments, *more)

    def check(self) -> dict[tuple[str, str], str]:
        """Every sample has its two rows; every caption is another."""
        found = harness.captions(self.out)
        assert len(found) == 2 * COUNT
        assert len(set(found.values())) == 2 * COUNT
        assert vila2_fast(self.tmp, "verify", self.out).code == 0
        return found


def test_rows_and_what_they_hold(tmp_path: Path, photos: Path) -> None:
    bad = sources.write_folder(tmp_path / "bad", 3, bad=True)
    with running(answer=answer) as server:
        job = Job(tmp_path, bad, server)
        done = job.run("--send-format", "png", "--json")
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["model"] == "m"
    assert "by http://127.0.0.1" in summary["compute"]
    assert "nano" not in done.stderr
    rows = harness.rows(job.out)
    good = [row for row in rows if row["status"] == "ok"]
    assert summary["captioner"]["requests"] == len(good) >= 6
    assert {(row["num_tokens"], row["num_prompt_tokens"]) for row in good} == {(2, 11)}
    assert len({row["model_digest"] for row in rows}) == 1
    assert {row["error_kind"] for row in rows if row["status"] == "error"} >= {"empty_file", "not_an_image"}
    manifest = json.loads((job.out / "manifest.json").read_text())["settings"]
    assert manifest["backend"] == "http"
    assert manifest["send_format"] == "png"
    assert "template" not in manifest
    assert "base_url" not in manifest  # the same captions from wherever the model is served


def test_a_run_goes_on_elsewhere_and_gives_the_same_rows(tmp_path: Path, photos: Path) -> None:
    with running(answer=answer) as server:
        job = Job(tmp_path, photos, server)
        assert job.run("--limit", "9").code == 0
    with running(answer=answer) as one, running(answer=answer) as two:
        again = Job(tmp_path, photos, one, two)
        assert again.run().code == 0
        assert len(one.asked) + len(two.asked) == 2 * (COUNT - 9)
        found = again.check()
        whole = Job(tmp_path / "whole", photos, two)
        assert whole.run().code == 0
        assert whole.check() == found


def test_every_kind_of_fault_at_once(tmp_path: Path, photos: Path) -> None:
    faults = [
        Fault(429, headers=(("retry-after", "0.1"),)), Fault(500), Fault(200, "<html>"), Fault(how="close"),
        Fault(200, "{", how="cut"), Fault(how="stall"),
    ]  # fmt: skip

    def decide(asked: Asked) -> Fault | None:
        return faults[asked.number // 4 % len(faults)] if asked.number % 4 == 3 else None

    with running(answer=answer, decide=decide) as one, running(answer=answer, delay_s=0.02) as two:
        job = Job(tmp_path, photos, one, two)
        done = job.run("--request-timeout", "2")
        assert done.code == 0, done.stderr
        job.check()
        assert len(one.asked) + len(two.asked) > 2 * COUNT


def test_a_server_that_dies_and_comes_back_loses_nothing(tmp_path: Path, photos: Path) -> None:
    with running(answer=answer, delay_s=0.1) as server:
        process = start(tmp_path, *Job(tmp_path, photos, server).arguments)
        harness.wait_for(lambda: len(server.answered) >= 6)
        server.stop()
        time.sleep(0.5)
        server.start()
        done = process.wait()
        assert done.code == 0, done.stderr
        Job(tmp_path, photos, server).check()


def test_a_server_that_is_gone_ends_the_run_with_one_line_and_a_state_to_go_on_from(
    tmp_path: Path, photos: Path
) -> None:
    with running(answer=answer, delay_s=0.1) as server:
        job = Job(tmp_path, photos, server)
        process = start(tmp_path, *job.arguments, "--patience", "0.5")
        harness.wait_for(lambda: len(server.answered) >= 6)
        server.stop()
        done = process.wait()
        assert done.code == 1
        assert "error: no answer since" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: no answer since")
        assert server.url in done.stderr
        early = harness.captions(job.out)
        assert 6 <= len(early) < 2 * COUNT
        server.start()
        before = Counter(asked.number for asked in server.asked)
        assert job.run().code == 0
        assert early.items() <= job.check().items()
        assert len(server.asked) - len(before) == 2 * COUNT - len(early)


def test_a_bad_request_is_an_error_row_that_can_be_redone(tmp_path: Path, photos: Path) -> None:
    bad: set[bytes] = set()

    def decide(asked: Asked) -> Fault | None:
        if asked.number == 5:
            bad.add(asked.image)
        return Fault(400, '{"error": {"message": "cannot read the image"}}') if asked.image in bad else None

    with running(answer=answer, decide=decide) as server:
        job = Job(tmp_path, photos, server)
        done = job.run("--strict")
        assert done.code == 3, done.stderr
        assert "request_refused" in done.stdout
        server.decide = lambda asked: None
        assert job.run("--strict", "--retry-errors").code == 0
        job.check()


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path, photos: Path) -> None:
    with running() as server:
        for more, words in (
            (("--model", "other"), "has no model 'other'"),
            (("--device", "cpu"), "device means nothing to --backend http, only to native"),
            (("--base-url", "localhost"), "must begin with http://"),
        ):
            job = Job(tmp_path, photos, server)
            done = job.run(*more)
            assert (done.code, done.stdout) == (2, "")
            assert words in done.stderr
            assert not job.out.exists()
    done = Job(tmp_path, photos, server).run()
    assert done.code == 1
    assert "cannot connect" in done.stderr
    done = vila2_fast(tmp_path, "recaption", photos, "--backend", "http", "--out", tmp_path / "o")
    assert done.code == 2
    assert "needs --base-url" in done.stderr
