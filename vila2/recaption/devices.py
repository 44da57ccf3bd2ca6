"""`--devices`: which devices of this machine get a process each, and what each process is given of the machine."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vila2.config import RecaptionSettings
from vila2.data.dali import choose_decoder
from vila2.errors import UsageError
from vila2.recaption.work import default_decode_workers

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Device:
    """What one process runs on. `environment` is set for it before anything is imported there."""

    name: str
    kind: str  # as --device takes it: cpu or cuda
    environment: Mapping[str, str]


def list_devices(spec: str, num_gpus: Callable[[], int]) -> list[Device]:
    """The devices that `all`, `0,2,3` or `cpu:N` name; `num_gpus` counts those that torch sees here.

    UsageError for a GPU that is not there.
    """
    on_cpu = re.fullmatch(r"cpu:(\d+)", spec)
    if on_cpu:
        return [Device(f"CPU process {number}", "cpu", {_VISIBLE: ""}) for number in range(int(on_cpu[1]))]
    count = num_gpus()
    if not count:
        raise UsageError(
            f"--devices {spec}: torch sees no GPU here; use --devices cpu:N, or see `vila2-fast doctor`"
        )
    wanted = list(range(count)) if spec == "all" else [int(number) for number in spec.split(",")]
    missing = [number for number in wanted if number >= count]
    if missing:
        raise UsageError(f"--devices {spec}: there is no GPU {missing[0]}; torch sees {count}, from 0")
    # Where a scheduler has given us some of a machine's GPUs, ours are counted among those.
    visible = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return [
        Device(f"GPU {number}", "cuda", {_VISIBLE: visible[number] if visible else str(number)})
        for number in wanted
    ]


def settings_of(
    settings: RecaptionSettings, number: int, devices: list[Device], cores: int
) -> RecaptionSettings:
    """The settings of process `number`: its device, its rank among all, and its part of the cores."""
    count = len(devices)
    device = devices[number]
    # Beside a GPU the cores decode; beside a model on the CPU, half of them do, or of `--threads`.
    on_cpu = (settings.threads or cores) // (2 * count)
    decoding = min(16, cores // count if device.kind == "cuda" else on_cpu)
    if device.kind == "cuda" and choose_decoder(settings.decoder, on_gpu=True) == "dali":
        decoding = default_decode_workers("dali")
    if settings.decode_workers is not None:
        decoding = settings.decode_workers // count
    native = settings.backend == "native"
    return settings.model_copy(
        update={
            "device": device.kind if native else settings.device,
            "rank": settings.rank * count + number,
            "world_size": settings.world_size * count,
            "threads": max(1, (settings.threads or cores) // count) if native else settings.threads,
            "decode_workers": max(1, decoding),
        }
    )
