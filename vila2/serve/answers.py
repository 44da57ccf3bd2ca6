"""The JSON of answers: chat completions whole and in pieces, and the list of models."""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from vila2.backends import OUR_SERVER
from vila2.serve.chat import ApiError
from vila2.types import Caption, ErrorKind, FinishReason

# A loop that was cut is an end of the model's own making for OpenAI's clients; `stop_reason` says more, as in vLLM.
_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.REPETITION: "stop"}
DONE = b"data: [DONE]\n\n"


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Answer:
    """What every message about one request has in common."""

    def __init__(self, model: str) -> None:
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, caption: Caption) -> bytes:
        message = {"role": "assistant", "content": caption.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, **_ending(caption)}
        return to_json(
            {**self._common, "object": "chat.completion", "choices": [choice], "usage": _usage(caption)}
        )

    def first(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def last(self, caption: Caption) -> bytes:
        return self._chunk({}, **_ending(caption))

    def usage(self, caption: Caption) -> bytes:
        """The chunk that `stream_options: {include_usage: true}` asks for."""
        return _event({**self._common, "object": _CHUNK, "choices": [], "usage": _usage(caption)})

    def _chunk(self, delta: dict[str, str], **ending: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **ending}
        return _event({**self._common, "object": _CHUNK, "choices": [choice]})


_CHUNK = "chat.completion.chunk"


def error_event(error: ApiError) -> bytes:
    """An error after the stream has begun."""
    return _event(error.body())


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def _ending(caption: Caption) -> dict[str, Any]:
    is_loop = caption.finish_reason is FinishReason.REPETITION
    return {
        "finish_reason": _FINISH[caption.finish_reason],
        "stop_reason": "repetition" if is_loop else None,
    }


def _usage(caption: Caption) -> dict[str, int]:
    prompt, new = caption.num_prompt_tokens, caption.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def model_entry(name: str, digest: str, created: int, max_tokens: int, parallel: int) -> dict[str, Any]:
    """`digest` names the weights: a client's run is known by it, wherever they are served. `parallel` requests at
    once fill the engine."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OUR_SERVER,
        "digest": digest,
        "max_model_len": max_tokens,
        "parallel": parallel,
    }


def error_of(caption: Caption) -> ApiError:
    """The answer to a request that has no caption."""
    error = caption.error
    if error is None or error.kind is ErrorKind.ENGINE_ERROR:
        return ApiError(500, error.message if error else "the engine failed")
    if error.kind is ErrorKind.PROMPT_TOO_LONG:
        return ApiError(
            400, f"context length: {error.message}", param="messages", code="context_length_exceeded"
        )
    return ApiError(400, error.message, param="messages", code=error.kind.value)
