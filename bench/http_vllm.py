"""The http backend against a server that is not ours: vLLM's CPU build, serving llava-small. One command:

    python bench/http_vllm.py .cache/llava-small [--images 8] [--start-timeout 600]

Makes vLLM's environment at first (bench/peers/environments.py), starts its OpenAI-compatible server on this machine,
lets `vila2-fast recaption --backend http` write captions of JPEGs with the detail of photographs, verifies the output,
shows some rows, and ends the server. Exits 1, with the server's last error, where vLLM does not start.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from common import ROOT, photo_jpegs
from peers.environments import CACHE, ENVIRONMENTS, BuildError, Environment, last_error

from vila2.data.verify import iter_rows

COMMAND = [sys.executable, "-m", "vila2.cli"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def vllm_server(peer: Environment, checkpoint: Path, args: argparse.Namespace) -> Iterator[str]:
    """The base URL of a server that answers. RuntimeError if it ends, or does not answer in time."""
    port = free_port()
    log = CACHE / "logs" / "vllm-serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by itself it takes all cores but one, whoever is busy on them
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(CACHE / "vllm-cache"),
        "HF_HUB_OFFLINE": "1",
    }
    # Not the program `vllm`: it asks for the version of a package of that name, and this one is called vllm-cpu.
    command = [str(peer.python), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [
        str(peer.model(checkpoint)),
        "--served-model-name",
        "llava-small",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--dtype", args.dtype, "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
    command += ["--limit-mm-per-prompt", '{"image": 1}']
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + args.start_timeout
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                raise RuntimeError(f"vLLM ended with {process.returncode}: {last_error(log)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not answer within {args.start_timeout} s: {last_error(log)}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def recaption(url: str, folder: Path, args: argparse.Namespace) -> None:
    """Two prompts an image, verified. CalledProcessError if the command fails."""
    photos, out = folder / "photos", folder / "out"
    photos.mkdir()
    for number, data in enumerate(photo_jpegs(args.images)):
        (photos / f"{number:03d}.jpg").write_bytes(data)
    run = ["recaption", str(photos), "--backend", "http", "--base-url", url, "--out", str(out)]
    run += [
        "--prompt",
        "brief",
        "--prompt",
        "detailed",
        "--max-new-tokens",
        str(args.new_tokens),
        "--no-retry",
    ]
    run += ["--api-key-env", "NO_KEY"]
    subprocess.run([*COMMAND, *run], check=True, cwd=ROOT)
    subprocess.run([*COMMAND, "verify", str(out)], check=True, cwd=ROOT)
    rows = sorted(iter_rows(out), key=lambda row: (row["key"], row["prompt"]))
    for row in rows[:6]:
        print(f"  {row['key']} {row['prompt']}, {row['status']}: {row['caption'][:100]!r}", flush=True)
    print(
        f"{len(rows)} rows of {args.images} images, {sum(row['status'] != 'error' for row in rows)} with a caption"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--start-timeout", type=float, default=600, help="seconds that vLLM may take to start"
    )
    args = parser.parse_args()
    peer = ENVIRONMENTS["vllm"]
    try:
        peer.build(args.checkpoint)
        print(f"vllm-cpu {peer.version()}, {args.dtype}: starting", flush=True)
        start = time.monotonic()
        with vllm_server(peer, args.checkpoint, args) as url, tempfile.TemporaryDirectory() as folder:
            print(f"it answers after {time.monotonic() - start:.0f} s at {url}", flush=True)
            recaption(url, Path(folder), args)
    except (BuildError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
