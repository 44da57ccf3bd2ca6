"""`vila2-fast recaption`: the main command."""

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from vila2.cli.progress import Show
    from vila2.config import RecaptionSettings
    from vila2.recaption.estimate import Estimate
    from vila2.recaption.interrupt import Interrupts
    from vila2.recaption.stats import RunSummary

STRICT_EXIT = 3
INTERRUPTED_EXIT = 130
_DEFAULT_MODEL_NOTE = (
    "no --model: using nano, which ships with vila2-fast. "
    "It knows the scenes of `vila2-fast world` and no photographs."
)

click.rich_click.OPTION_GROUPS["*recaption"] = [
    {"name": "In and out", "options": ["--model", "--engine", "--out", "--image-root", "--recipe"]},
    {
        "name": "What is asked",
        "options": ["--prompt", "--prompt-text", "--prompt-file", "--prompt-template", "--template"],
    },
    {
        "name": "How it answers",
        "options": [
            "--max-new-tokens", "--min-new-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--stop",
            "--retry", "--no-retry", "--truncation", "--ignore-eos", "--deterministic", "--draft",
        ],
    },
    {
        "name": "Which images",
        "options": ["--max-pixels", "--min-side", "--max-aspect", "--orientation", "--decoder", "--resize"],
    },
    {
        "name": "Machine and scale",
        "options": [
            "--device", "--devices", "--precision", "--gpu-memory", "--backend", "--batch-size", "--threads",
            "--decode-workers", "--limit", "--rank", "--world-size", "--rows-per-part",
        ],
    },
    {
        "name": "Servers (--backend http)",
        "options": [
            "--base-url", "--api-key-env", "--send-format", "--send-size", "--request-timeout", "--patience",
        ],
    },
    {"name": "TensorRT-LLM (--backend trtllm)", "options": ["--engine-option"]},
    {"name": "Behaviour", "options": ["--dry-run", "--retry-errors", "--strict", "--json", "--round", "--help"]},
]  # fmt: skip


def _flag(name: str, text: str) -> Callable[[Any], Any]:
    """A switch that is None unless given, so that a recipe's value stands."""
    return click.option(f"--{name}/--no-{name}", default=None, help=text)


@click.command()
@click.argument("source", required=False)
@click.option(
    "--model",
    metavar="CKPT",
    help="A VILA or LLaVA checkpoint: a folder; for --backend http the server's name of it. [nano, which ships]",
)
@click.option("--out", metavar="DIR", help="The output folder; the same command again continues it.")
@click.option("--image-root", metavar="DIR", help="Where the image paths of a LLaVA JSON or Parquet start.")
@click.option("--recipe", metavar="FILE", help="Settings from a TOML or YAML file; options here override it.")
@click.option(
    "--prompt",
    multiple=True,
    metavar="NAME",
    help="A named prompt (see `vila2-fast prompts`); repeatable. [detailed]",
)
@click.option(
    "--prompt-text", metavar="TEXT", help="A prompt of your own; {original} is the sample's own caption."
)
@click.option("--prompt-file", metavar="FILE", help="Named prompts of your own (TOML or YAML).")
@click.option(
    "--prompt-template",
    metavar="TEXT",
    help="Text round every prompt: holds {prompt} and fields like {original}.",
)
@click.option(
    "--template", metavar="NAME", help="The chat template, where the checkpoint's own is not right."
)
@click.option("--max-new-tokens", type=int, metavar="N", help="The longest caption, in tokens. [256]")
@click.option("--min-new-tokens", type=int, metavar="N", help="The shortest caption, in tokens. [0]")
@click.option("--temperature", type=float, metavar="T", help="0 is greedy. [0]")
@click.option("--top-p", type=float, metavar="P", help="Sample from the likeliest tokens that make up P. [1]")
@click.option("--top-k", type=int, metavar="K", help="Sample from the K likeliest tokens; 0 is all. [0]")
@click.option("--seed", type=int, metavar="N", help="Decides wordings and samples. [0]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End a caption before this text; repeatable.")
@click.option(
    "--retry",
    multiple=True,
    metavar="T/P",
    help="Temperature and top-p of one more attempt at a caption that loops; repeatable. [0.4/0.9 0.8/0.95]",
)
@click.option("--no-retry", is_flag=True, help="Keep a looping caption at once, marked repetitive.")
@click.option(
    "--truncation",
    type=click.Choice(["trim", "mark"]),
    help="A caption cut by its length: trim it to a sentence, or mark it. [trim]",
)
@_flag("ignore-eos", "Write max-new-tokens tokens whatever the model says (for benchmarks).")
@click.option(
    "--draft",
    metavar="WHAT",
    help="What captions will resemble, to write the same ones faster: original, column:NAME, the output folder of "
    "an earlier run, off, or auto (the original from --round 2 on). Only the native backend can. [auto]",
)
@_flag("deterministic", "The same bytes whatever the batch size, the resume point or the ranks.")
@click.option(
    "--max-pixels", type=int, metavar="N", help="Refuse larger images (decompression bombs). [100000000]"
)
@click.option("--min-side", type=int, metavar="N", help="Refuse images with a side below N pixels. [4]")
@click.option(
    "--max-aspect",
    type=float,
    metavar="R",
    help="Refuse images longer than R times their width, or wider. [100]",
)
@click.option(
    "--orientation", type=click.Choice(["apply", "ignore"]), help="What to do with EXIF orientation. [apply]"
)
@click.option(
    "--decoder",
    type=click.Choice(["auto", "dali", "cpu"]),
    help="What decodes JPEGs: DALI (the GPU's nvJPEG), or this machine's CPU. [auto: DALI beside a model on a GPU]",
)
@click.option(
    "--resize",
    type=click.Choice(["exact", "fast"]),
    help="Pillow's own pixels, or 2 to 10 times faster and at most 2 grey levels away; beside DALI, fast resizes on "
    "the GPU, at most 3 levels away, where the model takes one square of an image. [exact]",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[auto]")
@click.option(
    "--devices",
    metavar="WHICH",
    help="One process a device, restarted if it dies: all (GPUs), 0,2,3, or cpu:N. [one process]",
)
@click.option(
    "--gpu-memory",
    type=float,
    metavar="SHARE",
    help="The share of a GPU's memory that may be used in all. [0.9]",
)
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "bf16", "int8", "fp8", "int4"]), help="[auto: bf16]"
)
@click.option(
    "--backend",
    metavar="NAME",
    help="What runs the model: native, trtllm (TensorRT-LLM), or http (any OpenAI-compatible server). [native]",
)
@click.option(
    "--base-url",
    multiple=True,
    metavar="URL",
    help="A server of --backend http, like http://localhost:8000/v1; repeatable, the load is shared.",
)
@click.option(
    "--api-key-env",
    metavar="VARIABLE",
    help="The environment variable that holds the servers' key. [OPENAI_API_KEY]",
)
@click.option(
    "--send-format",
    type=click.Choice(["jpeg", "png"]),
    help="How images travel to a server: small, or with every pixel as it is. [jpeg]",
)
@click.option(
    "--send-size", type=int, metavar="N", help="Shrink images to N pixels on the longest side first."
)
@click.option(
    "--request-timeout", type=float, metavar="S", help="Seconds that a server may take over a caption. [300]"
)
@click.option("--engine", metavar="DIR", help="A folder that `vila2-fast build` made, for either backend.")
@click.option(
    "--engine-option",
    multiple=True,
    metavar="NAME=VALUE",
    help="A further setting of tensorrt_llm's LLM; repeatable, refused if this version has none such.",
)
@click.option(
    "--patience", type=float, metavar="S", help="Stop when all servers have failed for S seconds. [120]"
)
@click.option("--batch-size", type=int, metavar="N", help="Captions written at once. [by memory; http: 256]")
@click.option("--threads", type=int, metavar="N", help="CPU threads of the model. [all cores]")
@click.option("--decode-workers", type=int, metavar="N", help="Threads that decode images. [by cores]")
@click.option("--limit", type=int, metavar="N", help="Only the first N samples, over all ranks.")
@click.option("--rank", type=int, metavar="R", help="Which of the processes this is, from 0. [0]")
@click.option("--world-size", type=int, metavar="N", help="How many processes share the source. [1]")
@click.option("--rows-per-part", type=int, metavar="N", help="Rows in a part file, at most. [2000]")
@_flag("dry-run", "Count the samples, caption a few, print an estimate of time and disk; write nothing.")
@_flag("retry-errors", "Also redo the samples that ended as errors.")
@_flag("strict", "Exit 3 if any sample ended as an error.")
@_flag("json", "JSON lines on stdout.")
@click.option(
    "--round", type=int, metavar="K", help="The round of self-augmentation, for the output's column. [0]"
)
def recaption(recipe: str | None, no_retry: bool, retry: tuple[str, ...], **options: Any) -> int:
    """Write new captions for the images of SOURCE into --out.

    SOURCE is a folder of images, WebDataset tars (a file, a folder, a pattern like 'train-{000..127}.tar'),
    a LLaVA JSON, or Parquet.

    \b
    vila2-fast recaption photos/ --model CKPT --out captions/
    vila2-fast recaption 'coyo-{000..127}.tar' --model CKPT --out coyo/ --prompt detailed --prompt ocr
    vila2-fast recaption data.json --image-root images/ --model CKPT --out new/ --dry-run
    vila2-fast recaption photos/ --backend http --base-url http://gpu:8000/v1 --model NAME --out captions/
    """
    from vila2.config import recaption_settings

    given = {name: value for name, value in options.items() if value != ()}
    if retry:
        given["retry"] = [_parse_retry(text) for text in retry]
    if no_retry:
        given["retry"] = []
    settings = recaption_settings(recipe, given)
    if settings.backend == "native" and "model" not in settings.model_fields_set:
        print(_DEFAULT_MODEL_NOTE, file=sys.stderr)
    if settings.dry_run:
        return _dry_run(settings)
    return _run(settings)


def _parse_retry(text: str) -> dict[str, float]:
    try:
        temperature, top_p = (float(part) for part in text.split("/"))
    except ValueError:
        raise click.UsageError(f"--retry {text!r}: expected TEMPERATURE/TOP_P, like 0.4/0.9") from None
    return {"temperature": temperature, "top_p": top_p}


def _run(settings: "RecaptionSettings") -> int:
    from vila2.cli.progress import print_event, shown
    from vila2.recaption.interrupt import Interrupts
    from vila2.recaption.pipeline import run

    interrupts = Interrupts()
    with interrupts.installed(), shown(settings.json_lines) as show:
        if settings.devices is None:
            summary = run(settings, observe=show, interrupts=interrupts)
        else:
            summary = _run_on_devices(settings, settings.devices, show, interrupts)
    if settings.json_lines:
        print_event("summary", summary.to_json())
    else:
        print(_describe(summary))
    if summary.interrupted:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED_EXIT
    return STRICT_EXIT if settings.strict and summary.errors_in_output else 0


def _run_on_devices(
    settings: "RecaptionSettings", spec: str, show: "Show", interrupts: "Interrupts"
) -> "RunSummary":
    from vila2.cli.progress import print_notice
    from vila2.recaption.devices import list_devices
    from vila2.recaption.processes import run_on_devices

    return run_on_devices(
        settings,
        list_devices(spec, _num_gpus),
        observe=show,
        notify=partial(print_notice, as_json=settings.json_lines),
        interrupts=interrupts,
    )


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _dry_run(settings: "RecaptionSettings") -> int:
    from vila2.cli.progress import print_event
    from vila2.recaption.devices import list_devices
    from vila2.recaption.estimate import estimate

    count = 1 if settings.devices is None else len(list_devices(settings.devices, _num_gpus))
    result = estimate(settings, processes=count)
    if settings.json_lines:
        print_event("estimate", result.to_json())
    else:
        print(_describe_estimate(result))
    return 0


def _describe(summary: "RunSummary") -> str:
    """The end of a run, for a person."""
    lines = [
        f"{summary.captions} captions of {summary.images} images in {summary.seconds:.1f} s "
        f"({summary.captions_per_s:.3g} captions/s, {summary.tokens_per_s:.3g} tokens/s) -> {summary.out}",
        f"model: {summary.model}, {summary.compute}",
    ]
    if summary.drafts.drafted:
        use = summary.drafts
        lines.append(
            f"drafts: {use.accepted} of {use.drafted} tokens were right, {use.tokens_per_step:.2f} tokens a step"
        )
    if summary.restarts:
        lines.append(f"processes that died and were restarted: {summary.restarts}")
    if summary.already_done:
        lines.append(f"{summary.already_done} rows were there already")
    marked = {name: count for name, count in summary.status.items() if name not in ("ok", "error")}
    if marked:
        lines.append("marked: " + ", ".join(f"{count} {name}" for name, count in marked.items()))
    if summary.error_kind:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.error_kind.items()))
        lines.append(f"quarantined: {summary.status['error']} rows ({kinds})")
    if summary.errors_in_output:
        lines.append(f"{summary.errors_in_output} rows of the output are errors; --retry-errors redoes them")
    return "\n".join(lines)


def _describe_estimate(result: "Estimate") -> str:
    from vila2.cli.progress import clock

    lines = [
        f"{result.samples} samples, {result.pending_images} of them to do, {result.prompts} prompts each"
    ]
    if result.probed:
        lines.append(
            f"probe: {result.probed} images in {result.probe_s:.1f} s, {result.captions_per_s:.2f} captions/s"
        )
        if result.processes > 1:
            lines.append(
                f"the estimate takes {result.processes} processes to be as fast as the one that was probed"
            )
        lines.append(f"estimate: {clock(result.seconds)} (h:mm:ss) and {result.disk_bytes / 2**20:.1f} MiB")
    return "\n".join(lines)
