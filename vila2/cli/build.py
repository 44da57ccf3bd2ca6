"""`vila2-fast build`: a checkpoint packed for CPU or GPU, measured against float32; or a TensorRT-LLM engine."""

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from vila2.backends.engine_build import Calibration
    from vila2.backends.engine_dir import EngineRecord


@click.command()
@click.argument("checkpoint")
@click.option("--out", metavar="DIR", help="The engine directory. [trtllm: in the cache, see `engines`]")
@click.option(
    "--backend",
    type=click.Choice(["native", "trtllm"]),
    default="native",
    show_default=True,
    help="What will run it.",
)
@click.option(
    "--precision",
    type=click.Choice(["int8", "bf16", "float32", "fp8", "int4", "int4-awq"]),
    help="How weights are kept and multiplied. [native: int8; trtllm: bf16]",
)
@click.option(
    "--max-batch", type=click.IntRange(1), metavar="N", help="trtllm: captions written at once. [256]"
)
@click.option(
    "--engine-option", multiple=True, metavar="NAME=VALUE", help="trtllm: a further setting of its LLM."
)
@click.option(
    "--calibration",
    metavar="SOURCE",
    help="Images to compare with float32 on, as for recaption. [scenes of the synthetic world]",
)
@click.option("--image-root", metavar="DIR", help="Where the image paths of a LLaVA JSON or Parquet start.")
@click.option(
    "--calibration-images",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    metavar="N",
    help="How many of them; 0 builds without measuring.",
)
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    metavar="N",
    help="int8: images of the synthetic world that weights are rounded for; 0 rounds each to its nearest step.",
)
@click.option("--prompt-text", metavar="TEXT", help="What is asked of them. [a detailed description]")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="The longest caption compared [64]; trtllm: the longest there is room for [256].",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(0),
    default=0.02,
    show_default=True,
    metavar="NATS",
    help="Refuse an engine whose next-token KL from float32 is above.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    default=0.97,
    show_default=True,
    metavar="SHARE",
    help="Refuse an engine that would write another next token more often.",
)
@click.option("--force", is_flag=True, help="Build it however far from float32 it is.")
@click.option(
    "--template", metavar="NAME", help="The chat template, where the checkpoint's own is not right."
)
@click.option(
    "--deterministic/--no-deterministic",
    default=False,
    help="For runs with --deterministic, where the CPU has bf16 instructions.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads. [all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print engine.json.")
def build(
    checkpoint: str,
    out: str | None,
    backend: str,
    precision: str | None,
    max_batch: int | None,
    engine_option: tuple[str, ...],
    calibration: str | None,
    image_root: str | None,
    calibration_images: int,
    samples: int,
    prompt_text: str | None,
    max_new_tokens: int | None,
    max_kl: float,
    min_agreement: float,
    force: bool,
    template: str | None,
    deterministic: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Pack CHECKPOINT into the engine directory --out and measure it against float32.

    `recaption --engine DIR` and `vila2.load(DIR)` then start at once: weights are mapped, and processes share them.
    int8, bf16 and float32 are for the CPU here. fp8 and int4 are for GPUs, and built on any machine: int4 is scaled by
    what the calibration images show, and where there is no GPU the measurement emulates it.
    With --backend trtllm the engine is TensorRT-LLM's, for the GPU here; `recaption --engine DIR` knows which is which.

    \b
    vila2-fast build VILA1.5-3b/ --precision int8 --out engines/vila-3b-int8
    vila2-fast build VILA1.5-3b/ --out engines/vila-3b-int8 --calibration photos/
    vila2-fast build VILA1.5-8b/ --precision fp8 --out engines/vila-8b-fp8
    vila2-fast build VILA1.5-8b/ --backend trtllm --precision fp8
    """
    if backend == "trtllm":
        _build_trtllm(
            checkpoint, out, precision or "bf16", max_batch, max_new_tokens or 256, engine_option, as_json
        )
        return
    if out is None:
        raise click.UsageError("--out is needed")
    if max_batch is not None or engine_option:
        raise click.UsageError("--max-batch and --engine-option are for --backend trtllm")
    precision = precision or "int8"
    if precision == "int4-awq":
        raise click.UsageError("--precision int4-awq is for --backend trtllm: int4 is ours")
    from vila2.backends.engine_build import build_engine
    from vila2.evaluate.calibration import of_source, of_world

    chosen: Calibration | None = None
    if calibration_images:
        if calibration is None:
            chosen = of_world(checkpoint, calibration_images)
        else:
            chosen = of_source(calibration, calibration_images, image_root)
        chosen = replace(
            chosen,
            prompt=prompt_text or chosen.prompt,
            max_new_tokens=max_new_tokens or 64,
            max_kl=None if force else max_kl,
            min_agreement=None if force else min_agreement,
        )
    record = build_engine(
        checkpoint,
        out,
        precision,
        deterministic=deterministic,
        threads=threads,
        template=template,
        calibration=chosen,
        samples=samples,
        observe=lambda stage: print(stage, file=sys.stderr),
    )
    if as_json:
        click.echo(json.dumps(record.to_json(), indent=2))
    else:
        click.echo(_describe(record, out))


def _build_trtllm(
    checkpoint: str,
    out: str | None,
    precision: str,
    max_batch: int | None,
    max_new_tokens: int,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    from vila2.backends.trtllm_build import build as build_engine

    if precision not in ("bf16", "fp8", "int4-awq"):
        raise click.UsageError(f"--precision {precision} is for --backend native")
    engine = build_engine(
        checkpoint,
        out,
        precision=precision.removesuffix("-awq"),
        max_batch=max_batch,
        max_new_tokens=max_new_tokens,
        options=options,
        observe=lambda stage: print(stage, file=sys.stderr),
    )
    spec = engine.spec
    if as_json:
        click.echo((engine.path / "engine.json").read_text(encoding="utf-8"))
        return
    click.echo(
        f"{engine.path}: {engine.name} in {spec.precision} for {spec.gpu['name']}, "
        f"tensorrt_llm {spec.versions['tensorrt_llm']} ({spec.generation} path), "
        f"up to {spec.limits['max_batch_size']} captions at once of {spec.limits['max_seq_len']} tokens"
    )


def _describe(record: "EngineRecord", out: str) -> str:
    lines = [
        f"{out}: {record.name} in {record.precision} ({record.layout}), {record.weight_bytes / 2**20:.1f} MiB"
    ]
    quality = record.quality
    if quality is None:
        return f"{lines[0]}; not measured against float32"
    lines.append(
        f"against float32 on {quality['images']} images of {quality['calibration']}: next-token KL "
        f"{quality['next_token_kl']:.2g}, greedy agreement {quality['greedy_agreement']:.2%}, "
        f"{quality['equal_captions']:.0%} of captions equal"
    )
    return "\n".join(lines)
