"""Write the tables of BENCHMARKS.md from bench/results: `python bench/tables.py BENCHMARKS.md`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; it shows the rows of the newest day and its device in
bench/results/NAME.csv (of `ONE_RUN`, those of the newest commit; of `NEWEST`, the last of each; of `ops`, which has a
hundred, the shapes that `SHOWN` picks). Older rows stay in the file, where trends can be read.
"""

import re
import sys
from pathlib import Path

from common import read_rows

# table -> the columns shown, by their headings
COLUMNS = {
    "recaption": {
        "commit": "commit",
        "engine": "engine",
        "precision": "precision",
        "batch": "batch",
        "images": "images",
        "rounds": "rounds",
        "images_per_s": "images/s",
        "slowest": "slowest round",
        "ratio": "against the peer's best of the run",
        "same_tokens": "same tokens",
    },
    "peers": {
        "engine": "engine",
        "version": "version",
        "precision": "precision",
        "batch": "batch",
        "images": "images",
        "rounds": "rounds",
        "images_per_s": "images/s",
        "slowest": "slowest round",
        "ours_times": "ours is, times",
        "ceiling": "product ceiling, GFLOP/s",
        "of_ceiling": "of the ceiling",
        "reason": "why not",
    },
    "profile": {
        "precision": "precision",
        "seconds": "seconds",
        "products": "products",
        "attention": "attention",
        "norms": "norms",
        "activations": "activations",
        "rope_and_cache": "rope, cache",
        "patches": "patches",
        "image_preparation": "image preparation",
        "sampling": "sampling",
        "all_else": "all else",
        "outside": "outside products and attention",
    },
    "shared_prefix": {
        "precision": "precision",
        "images": "images",
        "one_prompt_s": "one prompt, s",
        "three_prompts_s": "three prompts, s",
        "further_prompt": "a further prompt costs",
        "images_encoded": "images encoded",
        "prompt_tokens": "prompt tokens asked",
        "computed_tokens": "tokens computed",
    },
    "speculative": {
        "precision": "precision",
        "batch": "batch",
        "right_words": "words of the draft that are right",
        "guesses": "guesses from",
        "times_decoding": "decoding, times plain",
        "times_whole": "whole run, times plain",
        "tokens_per_step": "tokens a step",
        "accepted": "drafted tokens accepted",
        "images": "images",
        "rounds": "rounds",
        "note": "note",
    },
    "quality": {
        "commit": "commit",
        "model": "model",
        "precision": "precision",
        "samples": "rounded for samples",
        "images": "images",
        "tokens": "tokens",
        "kl": "next-token KL, nats",
        "agreement": "greedy agreement",
        "free_agreement": "tokens equal, written freely",
        "equal": "captions equal",
        "near_ties": "near ties of float32",
        "build_s": "build, s",
    },
    "memory": {
        "images": "images",
        "seconds": "seconds",
        "settled_mib": "MiB after warm-up",
        "end_mib": "MiB at the end",
        "most_mib": "most MiB",
        "trend_mib": "trend, MiB",
    },
    "serve": {
        "path": "path",
        "batch": "batch",
        "images": "images",
        "rounds": "rounds",
        "captions_per_s": "captions/s",
        "slowest": "slowest round",
        "of_in_process": "of in process",
        "cpu_ms": "CPU, ms a caption",
        "same_captions": "same captions",
    },
    "train": {
        "model": "shapes of",
        "engine": "engine",
        "precision": "precision",
        "batch": "batch",
        "steps": "steps a round",
        "rounds": "rounds",
        "samples_per_s": "samples/s",
        "slowest": "slowest round",
        "ours_times": "ours is, times",
        "loss_gap": "largest gap of a loss",
    },
    "train_step": {
        "model": "shapes of",
        "precision": "precision",
        "batch": "batch",
        "seconds": "seconds a step",
        "gflops": "GFLOP/s",
        "float32_ceiling": "float32 product",
        "bf16_ceiling": "bf16 product",
        "of_float32": "of float32's",
    },
    "train_memory": {
        "steps": "steps",
        "samples_per_s": "samples/s",
        "settled_mib": "MiB after warm-up",
        "end_mib": "MiB at the end",
        "most_mib": "most MiB",
        "trend_mib": "trend, MiB",
    },
    "decode": {
        "path": "path",
        "images_per_cpu_s": "images per CPU-second",
        "slowest": "slowest round",
        "ratio": "times",
    },
    "world": {
        "image_size": "pixels",
        "style": "style",
        "split": "split",
        "makes": "makes",
        "scenes": "scenes",
        "rounds": "rounds",
        "scenes_per_cpu_s": "scenes per CPU-second",
        "slowest": "slowest round",
    },
    "loop_estimate": {
        "recipe": "recipe",
        "of": "of",
        "estimated": "estimated, s",
        "was": "was, s",
        "times": "estimate, times",
    },
    "crossovers": {
        "precision": "precision",
        "product": "product",
        "rows_1": "1 row",
        "rows_4": "4 rows",
        "rows_16": "16",
        "rows_64": "64",
        "rows_256": "256",
        "rows_1024": "1024",
        "library_from": "library from",
    },
    "ops": {
        "op": "operation",
        "shape": "shape",
        "ours_us": "ours, us",
        "reference_us": "torch, us",
        "faster": "times",
        "rate": "rate",
        "unit": "unit",
        "of_ceiling": "of the ceiling",
    },
    "gpu": {
        "section": "section",
        "name": "what",
        "shape": "shape",
        "value": "value",
        "unit": "unit",
        "ratio": "ratio",
        "against": "of",
        "bar": "bar",
        "error": "error",
        "verdict": "verdict",
    },
}
SHOWN = {
    "ops": lambda row: (
        row["op"].startswith("attention")
        or row["shape"].endswith((" x 576 x 1536", " 1024 x 576", "1024 x 3072", "patch 14"))
        or (row["op"].startswith("rope") and row["shape"].startswith("1024"))
    )
}
# Tables that show the newest commit's rows only.
ONE_RUN = {
    "crossovers",
    "decode",
    "gpu",
    "loop_estimate",
    "peers",
    "serve",
    "speculative",
    "train",
    "train_step",
    "train_memory",
}
# Tables of what no clock measures, whose rows may come from several runs: of equal ones the newest is shown.
NEWEST = {"quality": ("model", "precision", "samples")}
SHARES = {"products", "attention", "norms", "activations", "rope_and_cache", "patches"}
SHARES |= {"agreement", "free_agreement", "equal", "near_ties"}
SHARES |= {
    "image_preparation",
    "sampling",
    "all_else",
    "outside",
    "of_ceiling",
    "right_words",
    "accepted",
    "of_in_process",
    "of_float32",
    "of_bf16",
}
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    """The newest rows of a table as markdown, with a line on what they ran on."""
    rows = read_rows(name)
    if not rows:
        return "Not measured yet.\n"
    last = rows[-1]
    same = ("date", "device", "commit") if name in ONE_RUN else ("date", "device")
    if name not in NEWEST:
        rows = [r for r in rows if all(r[key] == last[key] for key in same)]
    rows = [r for r in rows if SHOWN.get(name, lambda row: True)(r)]
    if name in NEWEST:
        rows = list({tuple(r[key] for key in NEWEST[name]): r for r in rows}.values())
    columns = COLUMNS[name]
    on = (
        f"driver {last['driver']}, CUDA {last['cuda']}, triton {last['triton']}"
        if "driver" in last
        else f"{last['isa']}, {last['threads']} threads"
    )
    lines = [f"{last['date']}, commit {last['commit']}, {last['device']}, {on}, "]
    lines[0] += f"torch {last['torch']}, transformers {last['transformers']}:\n"
    lines += ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(key, row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(key: str, value: str) -> str:
    return f"{float(value):.1%}" if key in SHARES and value else value


def filled(text: str) -> str:
    """The document with every table written anew. ValueError if it lacks the place of one."""
    missing = COLUMNS.keys() - {match.group(2) for match in PLACE.finditer(text)}
    if missing:
        raise ValueError(f"the document has no place for {sorted(missing)}")
    return PLACE.sub(lambda m: f"{m.group(1)}\n{table(m.group(2))}\n{m.group(3)}", text)


def main(path: Path) -> None:
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
