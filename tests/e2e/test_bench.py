"""`vila2-fast bench throughput`, as a user calls it."""

import csv
import json
from pathlib import Path

from tests.e2e.harness import vila2_fast

QUICK = ("--new-tokens", "3", "--images", "3", "--image-size", "32", "--rounds", "2", "--threads", "1")


def test_throughput_of_the_engine_and_of_the_pipeline(vila15: Path, tmp_path: Path) -> None:
    sizes = ("--batch-size", "1", "--batch-size", "2")
    table = tmp_path / "speed.csv"
    done = vila2_fast(tmp_path, "bench", "throughput", vila15, *QUICK, *sizes, "--csv", table, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ceiling"] > 0
    for row, batch_size in zip(result["rows"], (1, 2), strict=True):
        assert (row["batch_size"], row["new_tokens"], row["images"], row["rounds"]) == (batch_size, 3, 3, 2)
        assert row["engine_images_per_s"] >= row["engine_slowest"] > 0
        assert row["pipeline_images_per_s"] > 0
        assert row["of_ceiling"] == row["engine_images_per_s"] * row["flops_an_image"] / result["ceiling"]
    with table.open(newline="") as file:
        assert [row["batch_size"] for row in csv.DictReader(file)] == ["1", "2"]

    table.write_text("something else\n")
    done = vila2_fast(tmp_path, "bench", "throughput", vila15, *QUICK, "--csv", table)
    assert done.code == 2
    assert done.stderr == f"error: --csv {table}: it has other columns: choose another file\n"
    assert done.stdout == ""


def test_the_engine_alone_with_nano(tmp_path: Path) -> None:
    done = vila2_fast(tmp_path, "bench", "throughput", *QUICK, "--no-pipeline")
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("nano: bf16 weights")
    assert "3 tokens  engine" in done.stdout
    assert "files to rows" not in done.stdout
    assert "GFLOP/s, this machine's matrix product" in done.stdout


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = vila2_fast(tmp_path, "bench", "throughput", tmp_path / "none", *QUICK)
    assert done.code != 0
    assert done.stderr.count("\n") == 1
