"""A server around a tiny random checkpoint, in this process; its engine may be slowed down, or told to fail."""

import base64
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from vila2.backends.native import NativeCaptioner, open_checkpoint
from vila2.serve.server import Server, ServeSettings, bind
from vila2.types import Caption

NAME = "tiny"


class SlowCaptioner(NativeCaptioner):
    """`step_s` is slept before each step; `failure` is raised by the next."""

    step_s = 0.0
    failure: Exception | None = None

    def step(self) -> list[Caption]:
        time.sleep(self.step_s)
        if self.failure is not None:
            raise self.failure
        return super().step()


def open_tiny(checkpoint: Path, batch_size: int = 4) -> SlowCaptioner:
    captioner = open_checkpoint(
        checkpoint, device="cpu", precision="float32", threads=1, batch_size=batch_size, max_new_tokens=64
    )
    captioner.__class__ = SlowCaptioner
    assert isinstance(captioner, SlowCaptioner)
    return captioner


@contextmanager
def serving(captioner: NativeCaptioner, **settings: Any) -> Iterator[Server]:
    server = Server(captioner, ServeSettings(name=NAME, **settings), bind("127.0.0.1", 0))
    server.start()
    try:
        yield server
    finally:
        server.stop(now=True)
        server.wait()


def png(seed: int, size: tuple[int, int] = (40, 60)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def picture(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(data)}}


def body(*parts: Any, text: str = "What is it?", **fields: Any) -> dict[str, Any]:
    """A request: these parts, or one image, and then the text."""
    content = [*(parts or (picture(png(0)),)), {"type": "text", "text": text}]
    basic = {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0}
    return {**basic, "max_tokens": 8, **fields}


def post(server: Server, fields: Any, **options: Any) -> httpx.Response:
    options.setdefault("timeout", 60)
    if isinstance(fields, bytes):
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return httpx.post(f"{server.url}/v1/chat/completions", content=fields, headers=headers, **options)
    return httpx.post(f"{server.url}/v1/chat/completions", json=fields, **options)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, message, code; the form is OpenAI's."""
    error = json.loads(answer.text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["message"], error["code"]


def metric(server: Server, line: str, **options: Any) -> float:
    found = httpx.get(f"{server.url}/metrics", **options).text.splitlines()
    return next(float(one.rpartition(" ")[2]) for one in found if one.startswith(line + " "))
