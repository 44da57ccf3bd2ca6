"""Put a trained nano and its base parts into the package: bf16 weights, figures on held-out scenes, model cards.

    python recipes/nano/ship.py runs/nano

Reads `base` and the last stage's checkpoint in `train` and writes vila2/checkpoints/{nano,nano-base}.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from vila2 import __version__
from vila2.evaluate import Evaluation, evaluate

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE.parent.parent / "vila2" / "checkpoints"
LIMIT_MB = 25.0
OBJECTS = (1, 4)
# figure -> what it is, and the target that the project set (at least; chair.i at most)
TARGETS = {
    "objects.f1": ("objects of detailed captions, F1", 0.92),
    "chair.i": ("objects named that are not there (CHAIR-i)", 0.05),
    "pope.accuracy": ("presence (POPE), accuracy", 0.95),
    "pope.adversarial.accuracy": ("presence, adversarial negatives", 0.90),
    "relation.accuracy": ("relations, accuracy", 0.95),
    "reading.exact": ("signs read exactly", 0.90),
    "count.accuracy": ("counts, accuracy", 0.85),
}


def pack(source: Path, target: Path) -> float:
    """Copy a VILA checkpoint with its weights in bf16; returns the megabytes of weights."""
    shutil.rmtree(target, ignore_errors=True)
    size = 0
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        out = target / file.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
            save_file(tensors, out, metadata={"format": "pt"})
            out.chmod(0o644)
            size += out.stat().st_size
        elif file.suffix == ".json":
            shutil.copyfile(file, out)
    return size / 1e6


def trained(run: Path) -> Path:
    """The checkpoint of the last stage."""
    return max((run / "train").glob("[0-9][0-9]-*/checkpoint"))


def measure(checkpoint: Path, style: str, scenes: int) -> Evaluation:
    """All tasks on held-out scenes of one to four objects."""
    return evaluate(checkpoint, split="heldout", style=style, scenes=scenes, objects=OBJECTS)


def figures_table(found: dict[str, Evaluation]) -> str:
    """Targets first, then everything that was measured."""
    heads = [f"{style} style" for style in found]
    lines = ["| figure | target | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for name, (words, target) in TARGETS.items():
        sign = "at most" if name == "chair.i" else "at least"
        cells = [_cell(evaluation, name) for evaluation in found.values()]
        lines.append(f"| {words} | {sign} {target:.0%} | " + " | ".join(cells) + " |")
    for name in dict.fromkeys(name for evaluation in found.values() for name in evaluation.metrics):
        if name not in TARGETS:
            cells = [_cell(evaluation, name) for evaluation in found.values()]
            lines.append(f"| `{name}` | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(evaluation: Evaluation, name: str) -> str:
    figure = evaluation.metrics.get(name)
    if figure is None:
        return "-"
    show = (lambda value: f"{100 * value:.1f} %") if figure.is_share else (lambda value: f"{value:.2f}")
    if figure.low is None or figure.high is None:
        return show(figure.value)
    return f"{show(figure.value)} ({show(figure.low)} to {show(figure.high)})"


def stages_table(train: Path) -> str:
    """What each stage did, from its recipe and its summary."""
    lines = ["| stage | trains | steps | images | tokens | minutes |", "|---|---|---|---|---|---|"]
    recipe = json.loads((train / "recipe.json").read_text(encoding="utf-8"))["recipe"]
    for number, stage in enumerate(recipe["stage"], start=1):
        summary = json.loads((train / f"{number:02d}-{stage['name']}" / "summary.json").read_text())
        lines.append(
            f"| {stage['name']} | {', '.join(stage['train'])} | {summary['steps']} | {summary['images']:,} | "
            f"{summary['tokens']:,} | {summary['seconds'] / 60:.0f} |"
        )
    return "\n".join(lines)


def card(run: Path, found: dict[str, Evaluation], device: str, notes: str) -> str:
    """The model card in Markdown."""
    recipe = json.loads((run / "train" / "recipe.json").read_text(encoding="utf-8"))["recipe"]
    any_evaluation = next(iter(found.values()))
    values: dict[str, Any] = {
        "stages": stages_table(run / "train"),
        "figures": figures_table(found),
        "device": device,
        "notes": notes,
        "seed": recipe["seed"],
        "scenes": any_evaluation.settings["scenes"],
        "compute": any_evaluation.compute,
        "version": __version__,
    }
    return (HERE / "card.md").read_text(encoding="utf-8").format(**values)


def base_card(run: Path) -> str:
    """The card of the base parts, with how the tower was made."""
    tower = json.loads((run / "tower" / "tower.json").read_text(encoding="utf-8"))
    alt, located = tower["alt_texts"], tower["located"]
    values = {
        "alt_steps": alt["steps"],
        "alt_batch": alt["batch"],
        "names": alt["name_recall"],
        "located_steps": located["steps"],
        "located_batch": located["batch"],
        "patches": located["patches_named"],
        "signs": located["signs_read"],
    }
    return (HERE / "card-base.md").read_text(encoding="utf-8").format(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/nano"))
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--device", default="one core of an AMD EPYC, no GPU", help="what it was trained on")
    parser.add_argument("--notes", default="", help="what else a reader of the card must know")
    parser.add_argument("--into", type=Path, default=CHECKPOINTS, help="the folder of both [the package's]")
    args = parser.parse_args()
    nano, base = args.into / "nano", args.into / "nano-base"
    size = pack(trained(args.run), nano) + pack(args.run / "base", base)
    if size > LIMIT_MB:
        raise SystemExit(f"{size:.1f} MB of weights, more than {LIMIT_MB:.0f}")
    found = {style: measure(nano, style, args.scenes) for style in ("fluent", "second")}
    summaries = {style: evaluation.summary() for style, evaluation in found.items()}
    (nano / "figures.json").write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    (nano / "README.md").write_text(card(args.run, found, args.device, args.notes), encoding="utf-8")
    (base / "README.md").write_text(base_card(args.run), encoding="utf-8")
    print(f"{size:.1f} MB -> {nano}, {base}")


if __name__ == "__main__":
    main()
