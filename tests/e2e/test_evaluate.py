"""`vila2-fast evaluate` as a user runs it, on tiny random checkpoints: what they say is nonsense, and repeatable."""

import json
from pathlib import Path

import pytest

from tests.e2e.harness import Done, vila2_fast
from vila2.evaluate import Evaluation, load_evaluation

FEW = ("--scenes", "4", "--limit", "3", "--max-new-tokens", "10", "--threads", "1", "--precision", "float32")


def evaluated(tmp: Path, checkpoint: Path, *options: str | Path) -> Done:
    return vila2_fast(tmp, "evaluate", checkpoint, *FEW, *options)


@pytest.fixture(scope="module")
def results(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of two checkpoints on the same scenes, and what was printed of the first."""
    tmp = tmp_path_factory.mktemp("evaluations")
    files = {
        "vila15": tmp / "vila15.json",
        "nvila": tmp / "deep" / "nvila.json",
        "printed": tmp / "printed.txt",
    }
    for name in ("vila15", "nvila"):
        done = evaluated(tmp, checkpoints[name], "--out", files[name])
        assert done.code == 0, done.stderr
        assert done.stderr == ""
        if name == "vila15":
            files["printed"].write_text(done.stdout)
    return files


def test_the_table_names_what_was_asked_and_shows_the_files_figures(
    results: dict[str, Path], vila15: Path
) -> None:
    printed, found = results["printed"].read_text(), load_evaluation(results["vila15"])
    assert f"{vila15}, float32: {len(found.records)} answers in " in printed
    assert (
        "4 scenes of 1-5 objects: split heldout, style fluent, seed 0, 70 px, at most 3 questions" in printed
    )
    assert str(results["vila15"]) in printed
    rows = {words[0]: words[1:] for line in printed.splitlines() if (words := line.split())}
    readable = found.metrics["answers.readable"]
    assert rows["answers.readable"][0] == f"{readable.value * 100:.1f}"
    assert f"{readable.low * 100:.1f} to {readable.high * 100:.1f}" in printed  # type: ignore[operator]
    assert "objects.f1" in rows
    assert "captions.cut" not in rows  # a detail
    assert "more figures with --details" in printed
    assert max(map(len, printed.splitlines()[2:-2])) < 110
    asked = [record for record in found.records if record.task != "captions"]
    assert readable.count == len(asked) == 12
    assert {record.scene for record in found.records} == set(range(4))


def test_json_and_details_of_a_part(tmp_path: Path, vila15: Path, results: dict[str, Path]) -> None:
    whole = load_evaluation(results["vila15"])
    done = evaluated(tmp_path, vila15, "--tasks", "captions", "--json")
    assert done.code == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["records"] == 4
    assert values["settings"] == whole.settings | {"tasks": ["captions"]}
    assert values["model_digest"] == whole.model_digest
    captions = {
        name: e.value for name, e in whole.metrics.items() if name.startswith(("objects", "chair", "capt"))
    }
    assert {name: values["metrics"][name]["value"] for name in captions} == captions  # greedy: said again
    detailed = evaluated(tmp_path, vila15, "--tasks", "captions", "--details")
    for name in values["metrics"]:
        assert f"  {name} " in detailed.stdout
    assert "--details" not in detailed.stdout


def test_the_second_style_and_fewer_objects_are_other_scenes(
    tmp_path: Path, vila15: Path, results: dict[str, Path]
) -> None:
    out = tmp_path / "other.json"
    others = {"style": ("--style", "second"), "objects": ("--objects", "1-2")}
    for name, options in others.items():
        done = evaluated(tmp_path, vila15, "--tasks", "count", *options, "--out", out)
        assert done.code == 0, done.stderr
        refused = vila2_fast(tmp_path, "evaluate", "--compare", results["vila15"], out)
        assert refused.code == 2
        assert f"different scenes ({name} is " in refused.stderr
    assert load_evaluation(out).settings["objects"] == "1-2"


def test_two_results_side_by_side(tmp_path: Path, results: dict[str, Path]) -> None:
    a, b = (load_evaluation(results[name]) for name in ("vila15", "nvila"))
    done = vila2_fast(tmp_path, "evaluate", "--compare", results["vila15"], results["nvila"])
    assert done.code == 0, done.stderr
    assert (
        f"A: {a.checkpoint}\nB: {b.checkpoint}\n{len(a.records)} pairs of answers, 4 scenes\n" in done.stdout
    )
    (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("  captions.words"))
    assert row[1:3] == [f"{e.metrics['captions.words'].value:.2f}" for e in (a, b)]
    values = json.loads(
        vila2_fast(tmp_path, "evaluate", "--compare", results["vila15"], results["nvila"], "--json").stdout
    )
    words = values["metrics"]["captions.words"]
    assert words["difference"] == pytest.approx(words["b"] - words["a"])
    assert words["low"] <= words["difference"] <= words["high"]
    assert 0 < words["p"] <= 1


def test_captions_of_a_recaption_output_against_the_truth_beside_its_images(
    tmp_path: Path, vila15: Path
) -> None:
    world, out, file = tmp_path / "world", tmp_path / "out", tmp_path / "captions.json"
    made = vila2_fast(tmp_path, "world", "make", world, "--scenes", "5", "--split", "heldout")
    assert made.code == 0, made.stderr
    done = vila2_fast(
        tmp_path,
        "recaption",
        world,
        "--model",
        vila15,
        "--out",
        out,
        "--max-new-tokens",
        "6",
        "--threads",
        "1",
    )
    assert done.code == 0, done.stderr
    scored = vila2_fast(tmp_path, "evaluate", "--captions", out, "--out", file)
    assert scored.code == 0, scored.stderr
    assert f"{out}: 5 answers in " in scored.stdout
    found: Evaluation = load_evaluation(file)
    assert {record.scene for record in found.records} == set(range(5))
    assert found.metrics["objects.recall"].count > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such/folder",), "no/such/folder"),
        (("{ckpt}", "--tasks", "counting"), "no task 'counting'; there are all, presence, captions"),
        (("{ckpt}", "--objects", "few"), "'few' is no number or range of objects, like 3 or 1-4"),
        (("{ckpt}", "--objects", "3-6"), "scenes have 1 to 5 objects, not 3 to 6"),
        (("{ckpt}", "--split", "test"), "no split 'test'; there are pretrain, instruct, dev, heldout"),
        (("{ckpt}", "--scenes", "0"), "--scenes"),
        (("{ckpt}", "--precision", "int2"), "precision 'int2' is not one of"),
        (
            ("{ckpt}", "--compare", "a", "b"),
            "give one of CHECKPOINT, --compare, --captions and --pairs, not ",
        ),
        (("--compare", "{ckpt}/config.json", "b"), "not a result that `vila2-fast evaluate --out` wrote"),
        (("--captions", "{ckpt}/config.json"), "--captions of a file needs --references or --truth"),
        (("--pairs", "a", "b"), "--pairs needs --judge-url and --judge-model"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tmp_path: Path, vila15: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = vila2_fast(tmp_path, "evaluate", *(part.format(ckpt=vila15) for part in arguments))
    assert done.code in (1, 2)
    assert message in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_result_that_cannot_be_written_is_known_before_the_work(tmp_path: Path, vila15: Path) -> None:
    (tmp_path / "file").write_text("")
    done = evaluated(tmp_path, vila15, "--out", tmp_path / "file" / "result.json")
    assert done.code == 1
    assert "cannot write the result" in done.stderr
    assert done.stdout == ""
