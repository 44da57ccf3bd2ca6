"""A run may stop at any moment, by any means, and be split in any way: the rows are the same in the end."""

import signal
from pathlib import Path

import pytest

from tests.e2e import harness, sources
from tests.e2e.harness import start, vila2_fast, wait_for

COUNT = 10
# Sampled and deterministic: a caption then shows at once if it depends on anything but its sample and the seed.
OPTIONS = (
    "--max-new-tokens", "8", "--threads", "1", "--deterministic", "--temperature", "0.8", "--seed", "3",
    "--prompt", "brief", "--prompt", "detailed",
)  # fmt: skip


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sources.write_tars(tmp_path_factory.mktemp("tars") / "tars", COUNT)


@pytest.fixture(scope="module")
def reference(
    tars: str, vila15: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], str]:
    tmp = tmp_path_factory.mktemp("reference")
    done = vila2_fast(tmp, "recaption", tars, "--model", vila15, "--out", tmp / "out", *OPTIONS)
    assert done.code == 0, done.stderr
    found = harness.captions(tmp / "out")
    assert len(found) == 2 * COUNT
    assert len(set(found.values())) > COUNT  # the captions do differ
    return found


class Job:
    """The same command in a fresh output folder."""

    def __init__(self, tmp: Path, tars: str, model: Path) -> None:
        self.tmp, self.out = tmp, tmp / "out"
        self.arguments = ["recaption", tars, "--model", str(model), "--out", str(self.out), *OPTIONS]

    def run(self, *more: str, fault: str = "") -> harness.Done:
        return vila2_fast(self.tmp, *self.arguments, *more, fault=fault)

    def check(self, reference: dict[tuple[str, str], str]) -> None:
        assert harness.captions(self.out) == reference
        assert vila2_fast(self.tmp, "verify", self.out).code == 0
        assert not list(self.out.rglob("*.tmp"))


@pytest.fixture
def job(tmp_path: Path, tars: str, vila15: Path) -> Job:
    return Job(tmp_path, tars, vila15)


def test_batches_resumes_and_ranks_give_the_same_bytes(
    job: Job, reference: dict[tuple[str, str], str]
) -> None:
    assert job.run("--batch-size", "1", "--limit", "3").code == 0
    checked = vila2_fast(job.tmp, "verify", job.out)
    assert checked.code == 1
    assert "missing: 14" in checked.stdout
    assert job.run("--batch-size", "3", "--rows-per-part", "2", "--limit", "5").code == 0
    ranks = [start(job.tmp, *job.arguments, "--rank", str(rank), "--world-size", "2") for rank in range(2)]
    for rank in ranks:
        done = rank.wait()
        assert done.code == 0, done.stderr
    job.check(reference)
    assert {path.name for path in job.out.glob("summary-*.json")} == {
        "summary-00000-of-00002.json",
        "summary-00001-of-00002.json",
    }


def test_killed_at_one_file_operation_after_the_other(
    job: Job, reference: dict[tuple[str, str], str]
) -> None:
    """Kill the run at its first operation on a file, the next at its second, ... until one gets through."""
    kills = 0
    while True:
        done = job.run("--rows-per-part", "2", fault=f"kill:{kills + 1}")
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done.stderr
        kills += 1
    assert kills >= 10
    job.check(reference)


@pytest.mark.parametrize("operation", [20, 33, 47, 61])
def test_killed_late_in_a_fresh_run(job: Job, reference: dict[tuple[str, str], str], operation: int) -> None:
    assert job.run("--rows-per-part", "3", fault=f"kill:{operation}").code == -signal.SIGKILL
    assert job.run("--rows-per-part", "5").code == 0
    job.check(reference)


@pytest.mark.parametrize("fault", ["enospc:9", "enospc:22", "eio:30", "edquot:2"])
def test_a_full_disk_is_one_line_and_a_state_to_go_on_from(
    job: Job, reference: dict[tuple[str, str], str], fault: str
) -> None:
    done = job.run("--rows-per-part", "4", fault=fault)
    assert done.code == 1
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: cannot write")
    assert "run the same command again" in lines[-1]
    assert "Traceback" not in done.stderr
    assert job.run().code == 0
    job.check(reference)


# Long captions one at a time: seconds to interrupt.
LONG = ("--max-new-tokens", "80", "--ignore-eos")
SLOW = (*LONG, "--batch-size", "1", "--rows-per-part", "1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_commits_and_says_how_to_go_on(job: Job, number: int) -> None:
    process = start(job.tmp, *job.arguments, *SLOW)
    wait_for(lambda: len(list(job.out.glob("parts/part-*.parquet"))) >= 2)
    process.send(number)
    done = process.wait()
    assert done.code == 130
    assert "run the same command again to continue" in done.stderr
    early = harness.captions(job.out)
    assert 2 <= len(early) < 2 * COUNT
    assert job.run(*LONG).code == 0
    assert vila2_fast(job.tmp, "verify", job.out).code == 0
    assert early.items() <= harness.captions(job.out).items()


def test_two_processes_of_one_rank_do_not_mix(job: Job) -> None:
    process = start(job.tmp, *job.arguments, *SLOW)
    wait_for(lambda: any(job.out.glob("parts/part-*.parquet")))
    second = job.run(*LONG)
    process.send(signal.SIGKILL)
    process.wait()
    assert second.code == 1
    assert "rank 0 is already at work" in second.stderr
    assert job.run(*LONG).code == 0  # the lock died with its process
    assert vila2_fast(job.tmp, "verify", job.out).code == 0


def test_other_settings_are_refused_by_name_and_harmless_ones_are_not(job: Job) -> None:
    assert job.run("--limit", "1").code == 0
    done = job.run("--seed", "4", "--top-k", "7")
    assert done.code == 1
    assert "seed was 3, is now 4" in done.stderr
    assert "top_k was 0, is now 7" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert job.run("--limit", "1", "--batch-size", "2", "--rows-per-part", "9").code == 0


def test_another_model_is_refused(job: Job, tmp_path: Path) -> None:
    from tests.checkpoints import write_vila15

    assert job.run("--limit", "1").code == 0
    other = write_vila15(tmp_path / "other", seed=5)
    done = job.run("--model", str(other))
    assert done.code == 1
    assert "model_digest was" in done.stderr


def test_errors_are_redone_when_asked(tmp_path: Path, vila15: Path) -> None:
    photos = sources.write_folder(tmp_path / "photos", 6)
    for name in ("000.jpg", "001.png"):
        (photos / name).write_bytes(b"")
    arguments = ["recaption", photos, "--model", vila15, "--out", tmp_path / "out", *OPTIONS]
    done = vila2_fast(tmp_path, *arguments, "--strict")
    assert done.code == 3
    assert "4 empty_file" in done.stdout
    (photos / "000.jpg").write_bytes(sources.picture(0, "JPEG"))
    assert vila2_fast(tmp_path, *arguments, "--strict").code == 3  # nothing to do, but the errors are there
    assert vila2_fast(tmp_path, *arguments, "--retry-errors", "--strict").code == 3
    found = harness.statuses(tmp_path / "out")
    assert found["000.jpg"] != "empty_file"
    assert found["001.png"] == "empty_file"
    (photos / "001.png").write_bytes(sources.picture(1))
    assert vila2_fast(tmp_path, *arguments, "--retry-errors", "--strict").code == 0
    assert vila2_fast(tmp_path, "verify", tmp_path / "out").code == 0
