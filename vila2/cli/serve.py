"""`vila2-fast serve`: the native engine behind an OpenAI-compatible API."""

import signal
import sys
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from vila2.serve.server import Server

click.rich_click.OPTION_GROUPS["*serve"] = [
    {"name": "Model", "options": ["--model", "--engine", "--name", "--template"]},
    {"name": "Address and key", "options": ["--host", "--port", "--api-key-env", "--api-key-file"]},
    {
        "name": "Limits",
        "options": [
            "--max-queue", "--max-body-mib", "--max-images", "--max-pixels", "--min-side", "--max-aspect", "--drain",
            "--cut-loops",
        ],
    },
    {
        "name": "Machine",
        "options": [
            "--device", "--precision", "--gpu-memory", "--batch-size", "--threads", "--decode-workers",
            "--max-new-tokens", "--resize", "--deterministic", "--help",
        ],
    },
]  # fmt: skip

# Options that decide how the model is opened.
_OPENING = (
    "device", "precision", "template", "batch_size", "threads", "deterministic", "max_new_tokens", "resize",
    "gpu_memory",
)  # fmt: skip


@click.command()
@click.option(
    "--model",
    metavar="CKPT",
    default="nano",
    help="A VILA or LLaVA checkpoint, or an engine. [nano, which ships]",
)
@click.option("--engine", metavar="DIR", help="A folder that `vila2-fast build` made.")
@click.option("--name", metavar="NAME", help="What clients call the model. [the checkpoint's folder]")
@click.option(
    "--template", metavar="NAME", help="The chat template, where the checkpoint's own is not right."
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen at; 0.0.0.0 is every one of this machine.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option(
    "--api-key-env", metavar="VARIABLE", help="The environment variable that holds the key clients must send."
)
@click.option("--api-key-file", metavar="FILE", help="The file that holds it.")
@click.option(
    "--max-queue",
    type=click.IntRange(0),
    default=256,
    show_default=True,
    metavar="N",
    help="Requests that may wait beyond those being written; more get 429.",
)
@click.option(
    "--max-body-mib",
    type=click.FloatRange(0, 1024, min_open=True),
    default=32,
    show_default=True,
    metavar="N",
    help="The largest request.",
)
@click.option(
    "--max-images",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    metavar="N",
    help="Images in a request.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=100_000_000,
    show_default=True,
    metavar="N",
    help="Refuse larger images (decompression bombs).",
)
@click.option(
    "--min-side",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    metavar="N",
    help="Refuse images with a side below N pixels.",
)
@click.option(
    "--max-aspect",
    type=click.FloatRange(1),
    default=100,
    show_default=True,
    metavar="R",
    help="Refuse images longer than R times their width, or wider.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=30,
    show_default=True,
    metavar="S",
    help="Seconds that requests have to end when the server is stopped.",
)
@click.option(
    "--cut-loops/--no-cut-loops",
    default=True,
    show_default=True,
    help="End an answer that repeats itself, unless the request says how.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bf16", "int8", "fp8", "int4"]),
    default="auto",
    help="[auto: bf16, or the engine's own]",
)
@click.option(
    "--gpu-memory",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    metavar="SHARE",
    help="The share of a GPU's memory that may be used in all.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Answers written at once. [by memory]"
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads of the model. [all cores]")
@click.option(
    "--decode-workers", type=click.IntRange(1), metavar="N", help="Threads that decode images. [by cores]"
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="N",
    help="The usual length of an answer, by which the cache is sized; requests say their own.",
)
@click.option(
    "--resize",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="Pillow's own pixels, or 2 to 10 times faster and at most 2 grey levels away.",
)
@click.option(
    "--deterministic/--no-deterministic", default=False, help="The same answer whatever else is in the batch."
)
def serve(**options: Any) -> int:
    """Answer chat completions about images, as OpenAI's API has them, until SIGINT or SIGTERM.

    POST /v1/chat/completions (images as data URLs; streaming too), GET /v1/models, /health, /metrics (Prometheus).

    \b
    vila2-fast serve --model CKPT
    vila2-fast recaption photos/ --backend http --base-url http://127.0.0.1:8000/v1 --out captions/
    """
    from vila2.errors import UsageError

    try:
        from vila2.serve.server import Server, ServeSettings, bind, is_public, read_key
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise UsageError(f'serve needs {error.name}: pip install "vila2-fast[serve]"') from None
    from vila2.backends.native import open_checkpoint
    from vila2.data.decode import DecodeLimits
    from vila2.types import RepetitionRule

    if options["api_key_env"] and options["api_key_file"]:
        raise UsageError("give --api-key-env or --api-key-file, not both")
    key = read_key(options["api_key_env"], options["api_key_file"])
    listener = bind(options["host"], options["port"])
    captioner = open_checkpoint(
        options["engine"] or options["model"],
        **{name: options[name] for name in _OPENING},
        shares_images=True,  # clients ask several things of an image, and say so by `siblings`
    )
    settings = ServeSettings(
        name=options["name"] or captioner.model_name,
        key=key,
        max_queue=options["max_queue"],
        max_body=int(options["max_body_mib"] * 2**20),
        max_images=options["max_images"],
        images=DecodeLimits(options["max_pixels"], options["min_side"], options["max_aspect"]),
        decode_workers=options["decode_workers"] or 0,
        drain_s=options["drain"],
        repetition=RepetitionRule() if options["cut_loops"] else None,
    )
    if key is None and is_public(listener):
        print("no API key: whoever reaches this address may use the model", file=sys.stderr)
    server = Server(captioner, settings, listener)
    _run(server, f"serving {settings.name} at {server.url}/v1: {captioner.description}")
    return 0


def _run(server: "Server", line: str) -> None:
    """Serve until a signal. The first lets requests end, the second does not."""
    signals = 0

    def stop(*_: Any) -> None:
        nonlocal signals
        signals += 1
        server.stop(now=signals > 1)

    server.start()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        print(line, flush=True)
        server.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
