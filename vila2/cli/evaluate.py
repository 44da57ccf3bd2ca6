"""`vila2-fast evaluate`: figures with intervals, comparisons, CIDEr of caption files, and a judge."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from vila2.evaluate import Comparison, Estimate, Evaluation
    from vila2.evaluate.judge import Judgement

click.rich_click.OPTION_GROUPS["*evaluate"] = [
    {
        "name": "A checkpoint on the world",
        "options": [
            "--tasks",
            "--split",
            "--style",
            "--scenes",
            "--objects",
            "--themes",
            "--sign-words",
            "--seed",
            "--limit",
            "--image-size",
        ],
    },
    {
        "name": "Machine",
        "options": ["--device", "--precision", "--batch-size", "--threads", "--max-new-tokens"],
    },
    {"name": "Captions that are there", "options": ["--captions", "--references", "--truth", "--prompt"]},
    {"name": "Two results", "options": ["--compare"]},
    {
        "name": "A judge of two caption files",
        "options": ["--pairs", "--judge-url", "--judge-model", "--judge-key", "--judge-workers", "--images"],
    },
    {"name": "Output", "options": ["--details", "--out", "--json", "--help"]},
]

_DEFAULT_NOTE = "no CHECKPOINT: measuring nano, which ships with vila2-fast"
_WIDE = 1000  # columns: wider than any table


def _objects(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """`1-4` or `3` as the fewest and the most."""
    if text is None:
        return None
    fewest, dash, most = text.partition("-")
    try:
        return int(fewest), int(most if dash else fewest)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no number or range of objects, like 3 or 1-4") from None


@click.command()
@click.argument("checkpoint", required=False)
@click.option(
    "--tasks",
    default="all",
    show_default=True,
    metavar="A,B",
    help="captions, presence, relation, count, position, color, reading, grounding, or all; presence is "
    "presence_random, presence_popular and presence_adversarial.",
)
@click.option(
    "--split",
    default="heldout",
    show_default=True,
    metavar="NAME",
    help="Whose scenes: pretrain, instruct, dev, heldout.",
)
@click.option(
    "--style", default="fluent", show_default=True, metavar="NAME", help="How they are drawn: fluent, second."
)
@click.option(
    "--scenes", type=click.IntRange(1), default=500, show_default=True, metavar="N", help="How many scenes."
)
@click.option(
    "--objects", callback=_objects, metavar="A-B", help="Only scenes of A to B objects, like 1-4. [1-5]"
)
@click.option("--themes", default="", metavar="A,B", help="Only names of these themes, like farm,home. [all]")
@click.option(
    "--sign-words", type=click.IntRange(1), metavar="N", help="Signs carry one of N words. [all there are]"
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Which world."
)
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="At most N questions a scene. [all there are]"
)
@click.option(
    "--image-size", type=click.IntRange(16), metavar="N", help="Draw at N pixels. [the model's own size]"
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--precision", default="bf16", show_default=True, metavar="NAME", help="As for recaption.")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Answers written at once. [by memory]"
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads of the model. [all cores]")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=192,
    show_default=True,
    metavar="N",
    help="The longest caption.",
)
@click.option("--out", metavar="FILE", help="Write figures and every answer as JSON.")
@click.option("--compare", nargs=2, metavar="A.json B.json", help="What B changes against A, paired.")
@click.option(
    "--captions", metavar="PATH", help="Captions: a recaption output, or a .json or .jsonl of keys and texts."
)
@click.option("--references", metavar="PATH", help="CIDEr against these: several a key, COCO's layout too.")
@click.option(
    "--truth", metavar="PATH", help="A world's folder: objects, CHAIR, relations. [the output's source]"
)
@click.option("--prompt", metavar="NAME", help="Which prompt of a recaption output. [its only one]")
@click.option("--pairs", nargs=2, metavar="A B", help="Two files of captions (as --captions) for a judge.")
@click.option(
    "--judge-url", metavar="URL", help="An OpenAI-compatible endpoint, like http://localhost:8000/v1."
)
@click.option("--judge-model", metavar="NAME", help="The model's name there.")
@click.option(
    "--judge-key",
    default="OPENAI_API_KEY",
    show_default=True,
    metavar="VARIABLE",
    help="The environment variable that holds the key.",
)
@click.option(
    "--judge-workers", type=click.IntRange(1), default=8, show_default=True, help="Pairs asked at once."
)
@click.option("--images", metavar="DIR", help="Show the judge DIR/KEY.jpg (png, webp, gif).")
@click.option("--details", is_flag=True, help="Print every figure, not the main ones only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    checkpoint: str | None,
    compare: tuple[str, str] | None,
    captions: str | None,
    pairs: tuple[str, str] | None,
    out: str | None,
    details: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure CHECKPOINT (nano, if none is given) on scenes whose truth is known, with 95 % intervals over scenes.

    Or compare two such results; or score captions that are there; or let a judge choose between two files of them.

    \b
    vila2-fast evaluate CKPT --scenes 1000 --objects 1-4 --out ckpt.json
    vila2-fast evaluate RUN/03-sft/checkpoint --tasks captions --scenes 100
    vila2-fast evaluate --compare before.json after.json
    vila2-fast evaluate --captions out/ --references coco.json
    vila2-fast evaluate --pairs a.jsonl b.jsonl --judge-url URL --judge-model NAME
    """
    from vila2.evaluate.evaluation import make_room

    given = {
        "CHECKPOINT": checkpoint,
        "--compare": compare,
        "--captions": captions,
        "--pairs": pairs,
    }
    chosen = [name for name, value in given.items() if value]
    if len(chosen) > 1:
        raise click.UsageError(
            f"give one of CHECKPOINT, --compare, --captions and --pairs, not {' and '.join(chosen)}"
        )
    if out:
        make_room(out)
    if compare:
        _compare(*compare, details, as_json)
    elif pairs:
        _judge(*pairs, out, as_json, options)
    elif captions:
        _report(_score(captions, options), out, details, as_json)
    else:
        if not checkpoint:
            print(_DEFAULT_NOTE, file=sys.stderr)
        from vila2.config import DEFAULT_MODEL  # brings pydantic: not for --help

        _report(_measure(checkpoint or DEFAULT_MODEL, options), out, details, as_json)


def _measure(checkpoint: str, options: dict[str, Any]) -> "Evaluation":
    from vila2.evaluate import evaluate as measure

    names = (
        "split", "style", "scenes", "objects", "sign_words", "seed", "limit", "image_size",
        "device", "precision", "batch_size", "threads", "max_new_tokens",
    )  # fmt: skip
    tasks, themes = (
        [name.strip() for name in options[key].split(",") if name.strip()] for key in ("tasks", "themes")
    )
    given = {name: options[name] for name in names}
    return measure(checkpoint, tasks, themes=themes, observe=_progress("scenes"), **given)


def _score(captions: str, options: dict[str, Any]) -> "Evaluation":
    from vila2.evaluate.caption_files import read_captions, read_references
    from vila2.evaluate.given import evaluate_references, evaluate_truths, source_of
    from vila2.evaluate.truths import read_truths

    if not options["references"] and not options["truth"] and not Path(captions).is_dir():
        raise click.UsageError("--captions of a file needs --references or --truth")
    texts = read_captions(captions, options["prompt"])
    if options["references"]:
        return evaluate_references(texts, read_references(options["references"]), captions)
    return evaluate_truths(texts, read_truths(options["truth"] or source_of(Path(captions))), captions)


def _report(result: "Evaluation", out: str | None, details: bool, as_json: bool) -> None:
    if out:
        result.save(out)
    if as_json:
        click.echo(json.dumps(result.summary()))
        return
    _show_evaluation(result, details)
    if out:
        click.echo(f"\nwith every answer: {out}")


def _compare(a: str, b: str, details: bool, as_json: bool) -> None:
    from vila2.evaluate import compare, load_evaluation

    result = compare(load_evaluation(a), load_evaluation(b))
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        _show_comparison(result, details)


def _judge(a: str, b: str, out: str | None, as_json: bool, options: dict[str, Any]) -> None:
    from vila2.data.files import atomic_write, write_error
    from vila2.evaluate.caption_files import read_captions, read_references
    from vila2.evaluate.chat import ChatClient, ChatSettings
    from vila2.evaluate.judge import judge, make_pairs

    if not options["judge_url"] or not options["judge_model"]:
        raise click.UsageError("--pairs needs --judge-url and --judge-model")
    truths = read_references(options["references"]) if options["references"] else None
    images = Path(options["images"]) if options["images"] else None
    read = [read_captions(path, options["prompt"]) for path in (a, b)]
    pairs = make_pairs(read[0], read[1], truths, images)
    settings = ChatSettings(options["judge_url"], options["judge_model"], options["judge_key"])
    with ChatClient(settings) as client:
        result = judge(pairs, client, workers=options["judge_workers"], observe=_progress("pairs"))
    text = json.dumps(result.to_json(), ensure_ascii=False)
    if out:
        try:
            atomic_write(Path(out), text.encode())
        except OSError as error:
            raise write_error(Path(out), error) from error
    click.echo(text) if as_json else _show_judgement(a, b, result)


def _progress(what: str) -> Any:
    """A counter on a terminal's stderr; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\r{done}/{total} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _show_evaluation(result: "Evaluation", details: bool) -> None:
    settings = result.settings
    answers = f"{len(result.records)} answers in {result.seconds:.1f} s"
    if "scenes" in settings:
        click.echo(f"{result.checkpoint}, {settings['precision']}: {answers}")
        click.echo(
            f"{settings['scenes']} scenes of {settings['objects']} objects: split {settings['split']}, style "
            f"{settings['style']}, seed {settings['seed']}, {settings['image_size']} px"
            + (f", at most {settings['limit']} questions a scene" if settings["limit"] else "")
        )
    else:
        alone = settings["without_caption"]
        click.echo(f"{result.checkpoint}: {answers}" + (f"; {alone} without a caption" if alone else ""))
    rows = {
        name: (_figure(e.value, e.is_share), _interval(e), f"{e.count:.0f}")
        for name, e in result.metrics.items()
    }
    _show_figures(("value", "95 % interval", "of"), rows, details, True, ", --out and --json")


def _show_comparison(result: "Comparison", details: bool) -> None:
    alone = f" ({result.unpaired} answers stand in one result only)" if result.unpaired else ""
    click.echo(
        f"A: {result.a}\nB: {result.b}\n{result.answers} pairs of answers, {result.scenes} scenes{alone}"
    )
    rows = {}
    for name, d in result.metrics.items():
        verdict, interval = "", ""
        if d.low is not None and d.high is not None:
            interval = f"{_signed(d.low, d.is_share)} to {_signed(d.high, d.is_share)}"
            if d.better and (d.low > 0 or d.high < 0):
                verdict = "better" if (d.value > 0) == (d.better == "higher") else "worse"
        rows[name] = (
            _figure(d.a, d.is_share),
            _figure(d.b, d.is_share),
            _signed(d.value, d.is_share),
            interval,
            f"{d.p:.4f}",
            verdict,
        )
    _show_figures(("A", "B", "B - A", "95 % interval", "p", "B is"), rows, details, False, " and --json")


def _show_figures(
    head: tuple[str, ...], rows: Mapping[str, tuple[str, ...]], details: bool, meanings: bool, elsewhere: str
) -> None:
    """The main figures by what was asked; with `meanings` what each is; with `details` all the others too."""
    from vila2.evaluate.tasks import HEADLINES

    groups = {
        title: {name: text for name, text in group.items() if name in rows}
        for title, group in HEADLINES.items()
    }
    main = {name for group in groups.values() for name in group}
    others = [name for name in rows if name not in main]
    if details:
        groups["details"] = dict.fromkeys(others, "")
    table: list[tuple[str, ...]] = []
    for title, group in groups.items():
        if group:
            table.append((("\n" if table else "") + title,))
            table += [
                (f"  {name}", *rows[name], *([text] if meanings else [])) for name, text in group.items()
            ]
    _table(("", *head, *([""] if meanings else [])), table)
    if others and not details:
        click.echo(f"\n{len(others)} more figures with --details{elsewhere}")


def _show_judgement(a: str, b: str, result: "Judgement") -> None:
    click.echo(f"A: {a}\nB: {b}\n{result.pairs} pairs, each in both orders, by {result.model}")
    click.echo(
        f"A wins {result.wins_a}, B wins {result.wins_b}, ties {result.ties} "
        f"(of which {result.inconsistent} changed with the order)"
    )
    click.echo(
        f"not judged: {result.refused} refused, {result.unreadable} unreadable; {result.retries} retries"
    )
    if result.win_rate is not None and result.low is not None and result.high is not None:
        click.echo(
            f"B's win rate {result.win_rate:.1%} ({result.low:.1%} to {result.high:.1%}; a tie is half a win), "
            f"p {result.p:.4f}"
        )
    if result.first_share is not None:
        click.echo(f"the caption shown first was preferred {result.first_share:.1%} of the time")


def _figure(value: float, is_share: bool) -> str:
    return f"{value * 100:.1f} %" if is_share else f"{value:.2f}"


def _signed(value: float, is_share: bool) -> str:
    return f"{value * 100:+.1f}" if is_share else f"{value:+.2f}"


def _interval(e: "Estimate") -> str:
    if e.low is None or e.high is None:
        return ""
    scale, digits = (100, 1) if e.is_share else (1, 2)
    return f"{e.low * scale:.{digits}f} to {e.high * scale:.{digits}f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as what stands in them: a figure is never cut, whatever the terminal's width."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in head:
        table.add_column(title, justify="right", no_wrap=True)
    table.columns[0].justify = "left"
    if not head[-1]:
        table.columns[-1].justify = "left"  # what a figure means
    for row in rows:
        table.add_row(*row)
    console = Console(width=_WIDE, highlight=False)
    with console.capture() as printed:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))
