"""A second round drafts from the first: the same captions as without, in fewer steps, and the run says so."""

import json
from pathlib import Path

from tests.e2e import harness, sources
from tests.e2e.harness import vila2_fast

OPTIONS = (
    "--max-new-tokens", "24", "--threads", "1", "--deterministic", "--prompt", "brief", "--prompt", "detailed",
)  # fmt: skip


def summary(out: Path) -> dict[str, object]:
    return json.loads((out / "summary.json").read_text())  # type: ignore[no-any-return]


def test_a_second_round_writes_the_same_captions_in_fewer_steps(tmp_path: Path, vila15: Path) -> None:
    tars = sources.write_tars(tmp_path / "tars", 8)
    first, second = tmp_path / "first", tmp_path / "second"

    def recaption(out: Path, *more: str) -> harness.Done:
        done = vila2_fast(tmp_path, "recaption", tars, "--model", vila15, "--out", out, *OPTIONS, *more)
        assert done.code == 0, done.stderr
        return done

    assert "drafts" not in recaption(first).stdout
    plain = summary(first)["drafts"]
    assert plain == {"drafted": 0, "accepted": 0, "tokens_per_step": 1.0}

    assert "tokens a step" in recaption(second, "--draft", str(first)).stdout
    assert harness.captions(second) == harness.captions(first)
    use = summary(second)["drafts"]
    assert use["drafted"] >= use["accepted"] > 0  # type: ignore[index]
    assert use["tokens_per_step"] > 1.0  # type: ignore[index]  # how far above depends on what a step costs here, which is measured

    # Alt-texts are poor drafts, and drafts decide nothing: the same folder goes on with others, or without.
    assert "16 rows were there already" in recaption(second, "--draft", "original").stdout
    third = tmp_path / "third"
    recaption(third, "--draft", "original", "--batch-size", "3")
    assert harness.captions(third) == harness.captions(first)


def test_a_draft_that_is_none_is_one_line(tmp_path: Path, vila15: Path) -> None:
    tars = sources.write_tars(tmp_path / "tars", 2)
    done = vila2_fast(
        tmp_path, "recaption", tars, "--model", vila15, "--out", tmp_path / "out", "--draft", "orignal"
    )
    assert done.code == 2
    assert done.stderr.splitlines()[-1].startswith("error: --draft orignal: neither off, auto, original")
    assert not (tmp_path / "out").exists()
