"""`--devices`: several processes as one run, killed and interrupted, on the real command line with a real model."""

import json
import os
import signal
from pathlib import Path

from tests.e2e import harness, sources
from tests.e2e.harness import start, vila2_fast, wait_for

COUNT = 60  # many more than a process holds in flight, which it finishes when it is asked to stop
OPTIONS = (
    "--max-new-tokens", "40", "--ignore-eos", "--deterministic", "--temperature", "0.8", "--seed", "3",
    "--batch-size", "1", "--rows-per-part", "1",
)  # fmt: skip


def test_killed_restarted_interrupted_and_resumed_gives_what_one_process_gives(
    tmp_path: Path, vila15: Path
) -> None:
    tars = sources.write_tars(tmp_path / "tars", COUNT)
    arguments = ["recaption", tars, "--model", vila15, *OPTIONS]
    one = vila2_fast(tmp_path, *arguments, "--threads", "1", "--out", tmp_path / "one")
    assert one.code == 0, one.stderr
    reference = harness.captions(tmp_path / "one")

    out = tmp_path / "out"
    arguments += ["--out", out]
    process = start(tmp_path, *arguments, "--devices", "cpu:2", "--json")

    def parts() -> int:
        return len(list(out.glob("parts/part-r00001-*.parquet")))

    wait_for(lambda: parts() >= 1, 170)  # a process loads torch first, on a machine that may be busy
    os.kill(json.loads((out / "locks/rank-00001.lock").read_text())["pid"], signal.SIGKILL)
    at_death = parts()
    wait_for(lambda: parts() > at_death, 170)
    process.send(signal.SIGINT)
    done = process.wait()
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.code == 130, done.stderr
    assert "run the same command again to continue" in done.stderr
    mine = [event for event in events if event["event"] == "process" and event["rank"] == 1]
    assert [event["what"] for event in mine] == ["started", "died", "started", "finished"]
    assert mine[1]["detail"].startswith("signal SIGKILL")
    assert mine[0]["device"] == "CPU process 1"
    assert (events[-1]["event"], events[-1]["restarts"], events[-1]["interrupted"]) == ("summary", 1, True)
    early = harness.captions(out)
    assert events[-1]["rows"] == len(early) < COUNT
    assert early.items() <= reference.items()

    again = vila2_fast(tmp_path, *arguments, "--threads", "1")  # any number of processes goes on, one too
    assert again.code == 0, again.stderr
    assert harness.captions(out) == reference
    assert vila2_fast(tmp_path, "verify", out).code == 0


def test_a_wrong_request_is_one_line(tmp_path: Path, vila15: Path) -> None:
    photos = sources.write_folder(tmp_path / "photos", 2)
    base = ["recaption", photos, "--model", vila15, "--out", tmp_path / "out"]
    for devices, message in (("cpu:x", "must be all, GPUs like 0,2,3"), ("63", "torch sees")):
        done = vila2_fast(tmp_path, *base, "--devices", devices)
        assert (done.code, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr
    assert not (tmp_path / "out").exists()
