"""What the parts of gpu_check share: timing on the device, its ceilings, results and the table of them."""

import datetime as dt
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import append_row, commit, installed

Call = Callable[[], object]

ORDER = ("decode", "kernels", "precision", "training", "captions")  # sections, the one that matters most last


@dataclass(frozen=True)
class Result:
    """One measurement. `error` is |ours - reference| / |reference| (None: nothing to compare), at most `tolerance`.

    `value` is what `unit` says, `ratio` what it is compared with by `bar`: the ratio should be at least that.
    """

    name: str
    shape: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""
    bar: float | None = None
    error: float | None = None
    tolerance: float = 0.0

    @property
    def is_right(self) -> bool:
        # A NaN is never below the tolerance.
        return self.error is None or self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        if not self.is_right:
            return "WRONG"
        if self.bar is None or self.ratio is None:
            return "-"
        return "met" if self.ratio >= self.bar else "missed"


def device_facts(*, dry: bool) -> dict[str, Any]:
    """Device, driver, versions, commit: the columns that every row begins with."""
    driver = ""
    if not dry:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(FileNotFoundError):
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            driver = done.stdout.strip().split("\n")[0]
    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "commit": commit(),
        "device": "none (dry)" if dry else torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
    }


class Report:
    """Collects results, prints each as it comes, writes rows, and ends with the table."""

    def __init__(self, facts: dict[str, Any], *, keeps_rows: bool) -> None:
        self.facts = facts
        self.keeps_rows = keeps_rows
        self.is_dry = not keeps_rows
        self.device = torch.device("cpu" if self.is_dry else "cuda")
        self.results: list[tuple[str, Result]] = []
        self.failures: list[tuple[str, str]] = []
        self.skipped: list[tuple[str, str]] = []
        self._ceilings: dict[str, float] = {}

    def seconds(self, call: Call, budget_s: float = 0.3) -> float:
        return median_seconds(call, 0.0 if self.is_dry else budget_s, self.device)

    def ceiling(self, kind: str) -> float:
        """Measured on this device, once: "copy" in bytes a second (read and written), "bf16" in FLOP a second."""
        if kind not in self._ceilings:
            self._ceilings[kind] = _copy_rate(self) if kind == "copy" else _product_rate(self)
        return self._ceilings[kind]

    def add(self, section: str, result: Result) -> None:
        """Keep a result, print it, and write its row. A dry run says nothing of speed, so its bars are left out."""
        if self.is_dry:
            result = replace(result, ratio=None, bar=None)
        self.results.append((section, result))
        print(f"{section}: {_line(result)}", flush=True)
        if self.keeps_rows:
            row = {
                "section": section,
                "name": result.name,
                "shape": result.shape,
                "value": result.value,
                "unit": result.unit,
                "ratio": "" if result.ratio is None else result.ratio,
                "against": result.against,
                "bar": "" if result.bar is None else result.bar,
                "error": "" if result.error is None else result.error,
                "verdict": result.verdict,
            }
            append_row("gpu", self.facts | row)

    def fail(self, section: str, trace: str) -> None:
        self.failures.append((section, trace))
        print(f"{section}: FAILED\n{trace}", flush=True)

    def skip(self, section: str, reason: str) -> None:
        self.skipped.append((section, reason))
        print(f"{section}: skipped, {reason}", flush=True)

    def table(self) -> list[str]:
        """A line for each name, its shapes in one; what is wrong comes last, and before it what captions need.

        Whoever reads the end of a log alone (12,000 characters, say) must find what matters there.
        """
        named: dict[tuple[str, str], list[Result]] = {}
        for section, result in self.results:
            named.setdefault((section, result.name), []).append(result)

        def weight(entry: tuple[tuple[str, str], list[Result]]) -> tuple[bool, int]:
            (section, _), results = entry
            return not all(result.is_right for result in results), ORDER.index(section)

        return [
            f"{section:9} {_short(results)}" for (section, _), results in sorted(named.items(), key=weight)
        ]

    def close(self) -> int:
        """Print the table; the exit status: 1 if anything was wrong or broke."""
        print(f"\n{self.facts['device']}, driver {self.facts['driver'] or '-'}, torch {self.facts['torch']}, "
              f"triton {self.facts['triton']}, commit {self.facts['commit']}")  # fmt: skip
        for kind, rate in self._ceilings.items():
            print(f"measured ceiling, {kind}: {rate / 1e12:.3g} T{'B' if kind == 'copy' else 'FLOP'}/s")
        for line in self.table():
            print(line)
        for section, reason in self.skipped:
            print(f"{section:9} skipped: {reason}")
        for section, trace in self.failures:
            print(f"{section:9} FAILED: {trace.strip().splitlines()[-1][:150]}")
        wrong = [result for _, result in self.results if not result.is_right]
        bars = [result for _, result in self.results if result.bar is not None]
        met = sum(result.verdict == "met" for result in bars)
        counts = f"{len(wrong)} wrong, {len(self.failures)} broken, {met} of {len(bars)} bars met"
        if self.skipped:
            counts += f", {len(self.skipped)} skipped"
        print(f"{len(self.results)} results, {counts}")
        return 1 if wrong or self.failures else 0


def _short(results: list[Result]) -> str:
    """A line of at most 115 characters with its section, for the results of one name."""
    first, count = results[0], len(results)
    values = sorted(result.value for result in results)
    ratios = sorted(result.ratio for result in results if result.ratio is not None)
    shape = first.shape if count == 1 else f"{count} shapes"
    parts = [f"{first.name:36.36} {shape:12.12} {_range(values):13} {first.unit:10.10}"]
    if ratios:
        parts.append(f"{_range(ratios)} of {first.against:.12}")
    if wrong := sum(not result.is_right for result in results):
        worst = max(result.error or 0.0 for result in results)
        parts.append(f"{wrong} WRONG, error {worst:.1e}")
    elif bars := [result for result in results if result.bar is not None]:
        met = sum(result.verdict == "met" for result in bars)
        parts.append(bars[0].verdict if count == 1 else f"{met}/{len(bars)} met")
    return " ".join(parts)


def _range(values: list[float]) -> str:
    low, high = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return low if low == high else f"{low}..{high}"


def _line(result: Result) -> str:
    parts = [f"{result.name:28} {result.shape:34} {result.value:10.4g} {result.unit:12}"]
    if result.ratio is not None:
        parts.append(f"{result.ratio:6.3g} of {result.against}")
    if result.bar is not None:
        parts.append(f"(bar {result.bar:g})")
    if result.error is not None:
        parts.append(f"error {result.error:.1e}")
    return " ".join([*parts, result.verdict])


def relative_error(ours: Any, reference: Any) -> float:
    """|ours - reference| / |reference| in float32, the worst of several tensors."""
    if isinstance(ours, tuple):
        return max(relative_error(one, other) for one, other in zip(ours, reference, strict=True))
    wide, expected = ours.float(), reference.float()
    norm = float(expected.norm())
    distance = float((wide - expected).norm())
    return distance / norm if norm else distance


def median_seconds(call: Call, budget_s: float, device: torch.device) -> float:
    """The median time of a call, by events on the device, its L2 cache flushed before each."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    call()
    torch.cuda.synchronize()
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    times = []
    end = time.monotonic() + budget_s
    while time.monotonic() < end or len(times) < 5:
        batch = []
        for _ in range(5):
            flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            batch.append((start, stop))
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) / 1e3 for start, stop in batch]
    return statistics.median(times)


def _copy_rate(report: Report) -> float:
    size = 1 << 12 if report.is_dry else 1 << 30
    source = torch.ones(size, dtype=torch.int8, device=report.device)
    target = torch.empty_like(source)
    return 2 * size / report.seconds(lambda: target.copy_(source))


def _product_rate(report: Report) -> float:
    side = 64 if report.is_dry else 8192
    a, b = (torch.randn(side, side, device=report.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / report.seconds(lambda: a @ b)
