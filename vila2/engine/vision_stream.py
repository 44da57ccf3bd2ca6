"""The vision tower beside the language model: on CUDA its batches run on a stream of their own.

Encoding is asked for ahead of need, so the tower fills what decoding leaves of the device. Whoever reads visual tokens
calls `join` first: the reader's stream then waits on the device for what was encoded, and the host for nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class VisionStream:
    """Runs encodes in order, one after another; on the CPU at once, where the caller stands."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done: torch.cuda.Event | None = None

    def run(self, encode: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `encode` returns, which may be on its way still: `join` before reading it."""
        if self._stream is None:
            return encode()
        reader = torch.cuda.current_stream()
        # Weights and inputs that the reader's stream has written must be there.
        self._stream.wait_stream(reader)
        with torch.cuda.stream(self._stream):
            tokens = encode()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        for part in tokens:
            # Memory of this stream, read by another: it must not be used again before the reader is done.
            part.record_stream(reader)
        return tokens

    def join(self) -> None:
        """Let the current stream wait for every encode so far."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
            self._done = None
