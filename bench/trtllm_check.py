"""The whole round of the TensorRT-LLM backend on a real installation, in one command, with a verdict.

    python bench/trtllm_check.py --model VILA1.5-3b/ [--precision bf16] [--images 32]

Builds the engine, captions scenes of the synthetic world by the native engine and by TensorRT-LLM, and compares them;
then checks what the adapter relies on. Exit code 0 when all holds. Needs a GPU and tensorrt_llm.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("Describe the image in detail.", "What is in the image? Answer briefly.")
MIN_PREFIX = 0.6  # of the tokens, before two ways of rounding part: bf16 against bf16, greedy
MIN_FIRST = 0.95  # of the captions must begin with the same three tokens


@dataclass
class Report:
    """What was checked, and how it went."""

    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)  # name -> "" or what is wrong

    def check(self, name: str, test: Callable[[], str]) -> None:
        """Run one check; a check that raises has failed."""
        try:
            self.checks[name] = test()
        except Exception as error:
            self.checks[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"{'ok  ' if not self.checks[name] else 'FAIL'}  {name}  {self.checks[name]}", flush=True)

    @property
    def failed(self) -> list[str]:
        return [name for name, problem in self.checks.items() if problem]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano", help="a VILA or LLaVA checkpoint")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp8", "int4"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the report there")
    options = parser.parse_args(arguments)
    report = Report()
    try:
        _round(options, report)
    except Exception as error:  # the round cannot go on: what was found so far is the report
        report.checks["the round"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for name, value in report.facts.items():
        print(f"      {name}: {value}")
    verdict = "all checks passed" if not report.failed else f"FAILED: {', '.join(report.failed)}"
    print(f"verdict: {verdict}")
    if options.json:
        text = json.dumps({"facts": report.facts, "checks": report.checks, "verdict": verdict}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if report.failed else 0


def _round(options: argparse.Namespace, report: Report) -> None:
    from vila2.backends.native import open_checkpoint
    from vila2.backends.trtllm import TrtllmCaptioner
    from vila2.backends.trtllm_api import load_api
    from vila2.backends.trtllm_build import build, this_gpu
    from vila2.config import RecaptionSettings
    from vila2.world import World, WorldSettings

    world = World(WorldSettings())
    images = [world.render(world.scene("dev", index)) for index in range(options.images)]
    api = load_api()
    handed = "PreprocessedInputs" if api.preprocessed_inputs is not None else "the input processor"
    report.facts |= {
        "gpu": this_gpu()["name"],
        **api.versions,
        "path": api.generation,
        "embeddings by": handed,
    }

    start = time.monotonic()
    engine = build(
        options.model,
        precision=options.precision,
        max_batch=options.max_batch,
        max_new_tokens=options.max_new_tokens,
        observe=lambda stage: print(f"      {stage}", flush=True),
    )
    report.facts |= {"engine": str(engine.path), "build or find, s": round(time.monotonic() - start, 1)}

    native = open_checkpoint(options.model, precision="bf16")
    theirs = _captions(native, images, options.max_new_tokens)
    native.close()
    settings = RecaptionSettings(
        source="-", out="-", backend="trtllm", model=options.model, request_timeout=120
    )
    captioner = TrtllmCaptioner(engine, settings, api)
    try:
        _captions(captioner, images[:2], 4)  # the first requests pay for what is compiled
        start = time.monotonic()
        ours = _captions(captioner, images, options.max_new_tokens)
        seconds = time.monotonic() - start
        report.facts |= {"captions/s": round(len(ours) / seconds, 2), **_agreement(ours, theirs)}
        again = _captions(captioner, images, options.max_new_tokens)
        _compare(report, options.precision, ours, theirs, again)
        _edges(report, captioner, api, images[0])
    finally:
        start = time.monotonic()
        captioner.close()
    took = time.monotonic() - start
    report.check("the worker shuts down", lambda: "" if took < 60 else f"{took:.0f} s")


def _captions(captioner: Any, images: list[Any], max_new_tokens: int) -> list[Any]:
    from vila2.types import CaptionRequest, SamplingParams

    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    requests = (
        CaptionRequest(
            i * len(PROMPTS) + n, prompt, (captioner.prepare(image),), sampling, ("image", i), len(PROMPTS)
        )
        for i, image in enumerate(images)
        for n, prompt in enumerate(PROMPTS)
    )
    found = {caption.id: caption for caption in captioner.caption(requests)}
    return [found[number] for number in sorted(found)]


def _agreement(ours: list[Any], theirs: list[Any]) -> dict[str, float]:
    """How far captions agree: equal ones, equal beginnings, and the common prefix as a share of the tokens."""
    pairs = list(zip(ours, theirs, strict=True))
    prefix = [
        _common(a.token_ids, b.token_ids) / max(1, len(a.token_ids), len(b.token_ids)) for a, b in pairs
    ]
    return {
        "equal captions": round(sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs), 3),
        "equal beginnings": round(sum(a.token_ids[:3] == b.token_ids[:3] for a, b in pairs) / len(pairs), 3),
        "common prefix": round(sum(prefix) / len(prefix), 3),
    }


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _compare(report: Report, precision: str, ours: list[Any], theirs: list[Any], again: list[Any]) -> None:
    errors = [caption.error.message for caption in ours if caption.error is not None]
    report.check("every request is answered", lambda: errors[0] if errors else "")
    agreement = _agreement(ours, theirs)
    prefix = MIN_PREFIX if precision == "bf16" else MIN_PREFIX / 2
    first = MIN_FIRST if precision == "bf16" else 0.8
    report.check(
        "captions begin as the native engine's",
        lambda: "" if agreement["equal beginnings"] >= first else f"{agreement['equal beginnings']:.0%}",
    )
    report.check(
        "captions go on as the native engine's",
        lambda: "" if agreement["common prefix"] >= prefix else f"{agreement['common prefix']:.0%}",
    )
    distinct = len({c.text for c in ours}) / max(1, len({c.text for c in theirs}))
    report.check(
        "no image is taken for another",
        lambda: (
            "" if distinct >= 0.8 else f"{distinct:.0%} as many different captions as the native engine's"
        ),
    )
    repeated = _agreement(ours, again)["common prefix"]
    report.check("a second pass agrees with the first", lambda: "" if repeated >= 0.8 else f"{repeated:.0%}")


def _edges(report: Report, captioner: Any, api: Any, image: Any) -> None:
    from vila2.backends.trtllm_api import check_options
    from vila2.errors import UsageError
    from vila2.types import CaptionRequest, ErrorKind, FinishReason, SamplingParams

    def one(prompt: str, **sampling: Any) -> Any:
        request = CaptionRequest(
            0, prompt, (captioner.prepare(image),), SamplingParams(**sampling), rng_key=7
        )
        return next(iter(captioner.caption([request])))

    def long_prompt() -> str:
        error = one("word " * 100_000, max_new_tokens=4).error
        return "" if error is not None and error.kind is ErrorKind.PROMPT_TOO_LONG else f"got {error}"

    def length() -> str:
        caption = one(PROMPTS[0], max_new_tokens=40, ignore_eos=True)
        fine = len(caption.token_ids) == 40 and caption.finish_reason is FinishReason.LENGTH
        return "" if fine else f"{len(caption.token_ids)} tokens, {caption.finish_reason.value}"

    def sampled() -> str:
        texts = [one(PROMPTS[0], max_new_tokens=24, temperature=1.5).token_ids for _ in range(2)]
        greedy = one(PROMPTS[0], max_new_tokens=24).token_ids
        if texts[0] == greedy:
            return "temperature 1.5 gives the greedy caption"
        return "" if texts[0] == texts[1] else "the same seed gives two captions"

    def stop() -> str:
        words = one(PROMPTS[0], max_new_tokens=24).text.split()
        if len(words) < 3:
            return ""
        text = one(PROMPTS[0], max_new_tokens=24, stop=(words[2],)).text
        return "" if words[2] not in text else f"{text!r} holds the stop text"

    def unknown() -> str:
        try:
            check_options({"no_such_setting": 1}, api.accepted)
        except UsageError:
            return ""
        return "it was accepted"

    report.check("a prompt that is too long is a row", long_prompt)
    report.check("more than the default of 32 tokens are written", length)
    report.check("temperature samples, and the seed decides", sampled)
    report.check("stop texts end a caption", stop)
    report.check("unknown settings are refused", unknown)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
