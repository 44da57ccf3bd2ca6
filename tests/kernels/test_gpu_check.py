"""The suite for a GPU runs without one: the same code on tiny shapes, every result right, no row written."""

import json
import re
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "bench" / "results" / "gpu.csv"
SCRIPT = ROOT / "bench" / "gpu_check.py"
sys.path.insert(0, str(ROOT / "bench"))
import gpu_check  # noqa: E402 - beside the script

# What the GPU image has beside Python's own; pillow comes with torchvision. No vila2 is installed there.
# torch looks for optree in the list of packages and then imports it: DALI, where it is installed beside us, brings it.
IMAGE = ("torch", "triton", "transformers", "numpy", "pillow", "pybind11", "scikit-build-core", "optree")

# What our own modules may take of it; pydantic and click come with transformers today, and need not tomorrow.
OURS_MAY = ("torch", "torchvision", "triton", "transformers", "safetensors", "numpy", "PIL", "vila2")

# Runs the script where nothing else can be imported, and where neither git nor nvidia-smi are.
BARE = """
import builtins, importlib.util, json, os, runpy, sys
lacking, allowed, root, script = *map(json.loads, sys.argv[1:4]), sys.argv[4]
ours = {name[:-3] for name in os.listdir(os.path.dirname(script)) if name.endswith('.py')}
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in lacking or name == 'vila2._C':
            raise ModuleNotFoundError(f'the GPU image has no {name}', name=name)
sys.meta_path = [Lacking(), *(f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__)]
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition('.')[0] in lacking else found(name, *more)
real = builtins.__import__
def checked(name, globals=None, locals=None, fromlist=(), level=0):
    file, top = (globals or {}).get('__file__') or '', name.partition('.')[0]
    if level == 0 and any(file.startswith(folder) for folder in root):
        if top not in allowed and top not in ours and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f'{file} wants {name}', name=name)
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = checked
os.environ['PATH'] = '/nowhere'
sys.argv = [script, *sys.argv[5:]]
runpy.run_path(script, run_name='__main__')
"""


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lacking() -> list[str]:
    """Everything installed here that is no part of the GPU image, nor needed by a part of it."""
    there, new = set(), list(IMAGE)
    while new:
        name = _plain(new.pop())
        if name in there:
            continue
        there.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue
        new += [re.split(r"[ ;<>=!~\[(]", need, maxsplit=1)[0] for need in needs if "extra ==" not in need]
    packages = packages_distributions()
    return [top for top, owners in packages.items() if not {_plain(owner) for owner in owners} & there]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_a_dry_run_is_right_everywhere_with_what_the_gpu_image_has():
    absent = lacking()
    assert {"pyarrow", "simplejpeg", "pytest", "rich_click", "sentencepiece"} <= set(absent)
    assert not {"torch", "triton", "transformers", "numpy", "safetensors", "PIL"} & set(absent)
    before = ROWS.read_bytes() if ROWS.exists() else None
    folders = [str(ROOT / name) + "/" for name in ("vila2", "kernels", "bench")]
    told = [json.dumps(value) for value in (sorted({*absent} - {"vila2"}), OURS_MAY, folders)]
    command = [sys.executable, "-c", BARE, *told, str(SCRIPT), "--dry", "--commit", "abc1234"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert re.search(r"results, 0 wrong, 0 broken, 0 of 0 bars met(, 1 skipped)?$", last)
    assert "commit abc1234" in done.stdout  # git is not there to say it
    for name in (
        "prefill attention",
        "repetition",
        "captions tiny",
        "memory tiny",
        "transformers tiny",
        "fp8 product",
        "captions tiny int4",
        "silu_mul backward",
        "softmax_error",
        "training step",
    ):
        assert name in done.stdout
    assert (ROWS.read_bytes() if ROWS.exists() else None) == before


def test_an_unknown_section_is_refused():
    done = check("--dry", "--only", "colours")
    assert done.returncode == 2
    assert "known are kernels" in done.stderr


def test_each_section_has_its_share_and_the_last_ends_before_the_time_does():
    ends = gpu_check.deadlines(list(gpu_check.SECTIONS), 480)
    assert ends == sorted(ends)
    assert ends[-1] == pytest.approx(0.9 * 480)
    assert all(later - sooner > 15 for sooner, later in pairwise([0.0, *ends]))
    assert gpu_check.deadlines(["decode"], 100) == [pytest.approx(90)]


def test_what_there_is_no_time_for_is_skipped_and_said():
    done = check("--dry", "--minutes", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.strip().splitlines()
    for name in gpu_check.SECTIONS:
        assert sum(line.startswith(name) and "skipped: no time was left" in line for line in said) == 1
    assert said[-1] == "0 results, 0 wrong, 0 broken, 0 of 0 bars met, 5 skipped"


def test_a_row_says_on_what_it_was_measured(tmp_path, monkeypatch):
    import common
    import gpu_report
    import tables
    import torch

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi, no git: columns are empty and nothing breaks
    report = gpu_report.Report({**gpu_report.device_facts(dry=False), "commit": "abc1234"}, keeps_rows=True)
    report.add(
        "kernels", gpu_report.Result("gelu", "2 x 3", 4.0, "us", 0.9, "copy bandwidth", 0.85, 1e-3, 1e-2)
    )
    report.add("kernels", gpu_report.Result("broken", "2 x 3", 4.0, "us", error=float("nan")))
    first, second = common.read_rows("gpu")
    assert (first["device"], first["commit"], first["torch"]) == (
        "NVIDIA H100 80GB HBM3",
        "abc1234",
        torch.__version__,
    )
    assert {"date", "driver", "cuda", "python", "triton", "transformers"} <= first.keys()
    assert (first["section"], first["ratio"], first["bar"], first["verdict"]) == (
        "kernels",
        "0.9",
        "0.85",
        "met",
    )
    assert second["verdict"] == "WRONG"
    shown = tables.table("gpu").splitlines()
    assert "commit abc1234, NVIDIA H100 80GB HBM3, driver" in shown[0]
    assert [line.split(" | ")[1] for line in shown[-2:]] == ["gelu", "broken"]
    assert report.close() == 1


def test_the_end_of_the_log_says_what_matters_in_a_few_thousand_characters(capsys):
    import gpu_report

    facts = {"device": "a card", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}
    report = gpu_report.Report(facts, keeps_rows=False)
    assert set(gpu_report.ORDER) == set(gpu_check.SECTIONS)
    for section in gpu_check.SECTIONS:
        for number in range(20):
            result = gpu_report.Result(
                f"a name of some length, {number}", "4096 x 4096 x 4096, 16 heads", 12345.678, "captions/s",
                0.98765, "copy bandwidth", 0.85,
            )  # fmt: skip
            report.results.append((section, result))
    for rows in range(9):
        report.results.append(
            (
                "precision",
                gpu_report.Result("int4 product", f"{rows} rows", rows, "us", 0.5, "copy", 0.4 + rows),
            )
        )
    wrong = gpu_report.Result("gelu", "2 x 3", 4.0, "us", error=0.5, tolerance=0.1)
    report.results.insert(0, ("kernels", wrong))
    assert report.close() == 1
    said = capsys.readouterr().out
    lines = said.strip().splitlines()
    assert len(said) < 12_000
    assert max(map(len, lines)) <= 115
    assert "gelu" in lines[-2]
    assert "1 WRONG, error 5.0e-01" in lines[-2]
    assert lines[-3].startswith("captions")
    [summary] = [line for line in lines if "int4 product" in line]
    assert "9 shapes" in summary
    assert "1/9 met" in summary


def test_tokens_are_compared_as_names():
    import gpu_kernels
    import torch

    tokens = torch.arange(64) * 1000
    others = tokens.clone()
    others[:2] = 100_000
    assert gpu_kernels.share_unequal(tokens, others) == 2 / 64 < 0.05


def test_torch_saying_that_it_may_overlook_waits_is_no_wait():
    import gpu_captions

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=1,
        )
        assert gpu_captions.count_waits(caught) == 0
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        assert gpu_captions.count_waits(caught) == 1


def test_the_rivals_batches_grow_until_they_are_no_better(monkeypatch):
    import gpu_captions
    import torch

    clock = [0.0]
    monkeypatch.setattr(gpu_captions.time, "monotonic", lambda: clock[0])

    def best(rates, until=1000.0):
        clock[0] = 0.0

        def seconds(batch):
            clock[0] += batch
            if rates[batch] is None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return batch / rates[batch]

        return gpu_captions.best_batch((32, 64, 128), seconds, until)

    assert best({32: 1.0, 64: 2.0, 128: 3.0}) == (3.0, 128, "")
    assert best({32: 1.0, 64: 2.0, 128: 1.5}) == (2.0, 64, ", 128 slower")
    assert best({32: 1.0, 64: None}) == (1.0, 32, ", 64 does not fit")
    assert best({32: 1.0, 64: 2.0}, until=200.0) == (2.0, 64, ", no time for 128")
    with pytest.raises(torch.OutOfMemoryError):
        best({32: None})


@pytest.mark.parametrize("file", sorted(path.stem for path in (ROOT / "kernels").glob("*.py")))
def test_every_kernel_has_its_formula_a_test_a_benchmark_and_a_line_of_the_notes(file):
    source = (ROOT / "kernels" / f"{file}.py").read_text()
    if "@triton.jit" not in source:
        assert file in ("device", "interpreter")
        return
    docstring = source.split('"""')[1]
    assert re.search(r"^    .* [=<]-? |^    rms_norm\(|^    gelu ", docstring, re.MULTILINE), "no formula"
    assert "vila2/ops/" in docstring, "no reference"

    def using(pattern: str) -> list[Path]:
        named = re.compile(rf"vila2\.kernels\.{file} import|vila2\.kernels import {file}\b")
        return [path for path in ROOT.glob(pattern) if named.search(path.read_text())]

    assert using("bench/gpu_*.py"), "no benchmark"
    assert using("tests/kernels/test_*.py"), "no test"
    assert using("tests/kernels/aot*.py"), "not compiled ahead of time"
    notes = (ROOT / "docs" / "kernels.md").read_text()
    assert re.search(rf"^\| [^|]*`{file}`", notes, re.MULTILINE), "no row in docs/kernels.md"
