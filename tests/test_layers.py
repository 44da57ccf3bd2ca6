"""The architecture as a test: who may import whom, what stays out of where, and how long a file may be.

It reads source with `ast` and imports nothing of the package, but in one subprocess: `import vila2` is light.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

# A package may import those before it, never those after it. `_C` is the compiled part of csrc.
ORDER = (
    ("types", "errors"),
    ("config",),
    ("data",),
    ("kernels", "_C"),
    ("ops",),
    ("model",),
    ("engine",),
    ("backends", "load"),  # `vila2.load` is a door to backends.native
    ("serve",),
    ("recaption",),
    ("train",),
    ("evaluate",),
    ("augment",),
    ("report",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

# Beyond the order: importer -> what it must not import (a module of vila2, or anything below it).
BANNED = {
    "engine": ("vila2.data", "vila2.config"),  # it gets pixels or embeddings, and plain arguments
    "recaption": ("vila2.engine", "vila2.model", "vila2.ops", "vila2.kernels", "vila2._C"),
    "train": ("vila2.engine", "vila2.backends"),
    "world": tuple(f"vila2.{name}" for name in LEVEL if name not in ("types", "errors", "config")),
}
# A third party -> the only places that may import it.
RIMS = {
    "torch": (
        "vila2/ops/",
        "vila2/model/",
        "vila2/engine/",
        "vila2/backends/",
        "vila2/train/",
        "vila2/cli/",
        "kernels/",
    ),
    "transformers": ("vila2/model/",),
    "click": ("vila2/cli/",),
    "rich": ("vila2/cli/",),
    "rich_click": ("vila2/cli/",),
    "pydantic": ("vila2/config.py", "vila2/train/recipe.py", "vila2/augment/recipe.py"),
    "peft": ("vila2/train/lora.py",),
    "matplotlib": ("vila2/train/plot.py",),
    "pyarrow": ("vila2/data/", "vila2/recaption/", "vila2/cli/"),
    "simplejpeg": ("vila2/data/", "vila2/cli/"),
    "PIL": ("vila2/data/", "vila2/model/", "vila2/backends/", "vila2/world/", "vila2/report/"),
    "nvidia": ("vila2/data/",),
    "tensorrt_llm": ("vila2/backends/",),
    "triton": ("kernels/",),
    "modelopt": ("vila2/backends/trtllm_quantize.py",),
    "aiohttp": ("vila2/backends/",),
    "httpx": ("vila2/backends/",),
    "starlette": ("vila2/serve/",),
    "uvicorn": ("vila2/serve/",),
    "prometheus_client": ("vila2/serve/",),
    "lmms_eval": ("vila2/evaluate/lmms.py",),
}
# Lazy doors: `vila2.load`, and `python -m vila2`.
DOORS = ("vila2/__init__.py", "vila2/__main__.py")


def module_name(path: Path) -> str:
    """`vila2/data/shards.py` -> `vila2.data.shards`; `kernels/x.py` -> `vila2.kernels.x`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("vila2", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {p: module_name(p) for base in ("vila2", "kernels") for p in sorted((ROOT / base).rglob("*.py"))}
MODULES = set(SOURCES.values())


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every module that the tree imports, anywhere in it; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_when_loaded(tree: ast.Module) -> Iterator[str]:
    """What importing the module imports at once: not inside functions, not under TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports_of(node)
        pending += ast.iter_child_nodes(node)


def package_of(module: str) -> str:
    """`vila2.data.shards` -> `data`."""
    return [*module.split("."), ""][1]


def lies_in(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    package = package_of(SOURCES[path])
    if relative(path) in DOORS:
        return
    assert package in LEVEL or package == "world", f"{relative(path)}: give {package!r} a place in ORDER"
    for target in imports_of(parse(path)):
        if not lies_in(target, "vila2") or package_of(target) not in LEVEL:
            continue
        if package != "world":
            assert LEVEL[package_of(target)] <= LEVEL[package], (
                f"{relative(path)} imports {target}, which lies above it"
            )
        banned = [place for place in BANNED.get(package, ()) if lies_in(target, place)]
        assert not banned, f"{relative(path)} imports {target}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_third_parties_stay_at_their_rim(path: Path) -> None:
    for target in imports_of(parse(path)):
        rim = RIMS.get(target.split(".")[0])
        assert rim is None or relative(path).startswith(rim), (
            f"{relative(path)} imports {target}; only {rim} may"
        )


def test_recaption_knows_backends_by_their_protocol_alone() -> None:
    inner = {m for m in MODULES if lies_in(m, "vila2.backends") and m != "vila2.backends"}
    for path, module in SOURCES.items():
        if package_of(module) == "recaption":
            reached = [t for t in imports_of(parse(path)) for m in inner if lies_in(t, m)]
            assert not reached, f"{relative(path)} imports {reached}"


def test_kernels_import_only_torch_and_triton() -> None:
    for path, module in SOURCES.items():
        if lies_in(module, "vila2.kernels"):
            for target in imports_of(parse(path)):
                top = target.split(".")[0]
                fine = top in sys.stdlib_module_names | {"torch", "triton"} or lies_in(
                    target, "vila2.kernels"
                )
                assert fine, f"{relative(path)} imports {target}"


def test_kernels_is_a_namespace() -> None:
    # With an __init__.py, `import kernels` in the root would find ours; transformers probes for that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def loaded_with(start: str) -> dict[str, list[str]]:
    """Module -> what it imports, for every module of ours that importing `start` loads."""
    by_name = {module: path for path, module in SOURCES.items()}
    reached: dict[str, list[str]] = {}
    pending = [start]
    while pending:
        module = pending.pop()
        if module in reached or module not in by_name:
            continue
        targets = list(imports_when_loaded(parse(by_name[module])))
        reached[module] = targets
        for target in targets:
            parts = target.split(".")
            pending += [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return reached


def test_function_bodies_do_not_count_as_loaded() -> None:
    tree = ast.parse(
        "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\ndef f():\n    import d\n"
    )
    assert sorted(imports_when_loaded(tree)) == ["a", "c"]
    assert sorted(imports_of(tree)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("start", ["vila2", "vila2.types", "vila2.config", "vila2.cli.main"])
def test_light_modules_reach_no_torch(start: str) -> None:
    assert start in MODULES
    for module, targets in loaded_with(start).items():
        heavy = [t for t in targets if t.split(".")[0] in ("torch", "transformers", "triton")]
        assert not heavy, f"importing {start} loads {module}, which imports {heavy}"


def test_import_vila2_loads_no_torch() -> None:
    code = "import sys, vila2; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_types_need_nothing_installed() -> None:
    for name in ("types", "errors"):
        for target in imports_of(parse(ROOT / "vila2" / f"{name}.py")):
            assert target.split(".")[0] in sys.stdlib_module_names, f"vila2/{name}.py imports {target}"


INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
CPP_SUFFIXES = {".cpp", ".h", ".hpp", ".inl", ".cc"}
CPP = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in CPP_SUFFIXES]


@pytest.mark.parametrize("path", CPP, ids=relative)
def test_only_the_bindings_know_python(path: Path) -> None:
    if relative(path).startswith("csrc/bindings"):
        return
    for header in INCLUDE.findall(path.read_text(encoding="utf-8")):
        assert not re.match(r"(Python\.h|pybind11/|torch/|ATen/|c10/)", header), (
            f"{relative(path)} includes {header}"
        )


def test_files_stay_small() -> None:
    folders = ("vila2", "kernels", "csrc", "tests", "bench", "examples")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in CPP_SUFFIXES | {".py", ".pyi"}]
    long = {
        relative(p): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert files
    assert not long, f"split these, {MAX_LINES} lines is the limit: {long}"
