"""A chat completion as it is asked for: what of OpenAI's API we take, and how the rest is refused.

A field that would change the answer in a way that we cannot is refused by name, and so is a field that nobody knows;
one that asks for nothing (`n: 1`, `presence_penalty: 0`) or is a note to the server's owner (`user`, `metadata`)
passes. Beyond OpenAI's: `top_k`, `min_tokens`, `ignore_eos` as in vLLM, `repetition` (a rule, or null for none) and
`siblings` (how many requests will come with these images). What is sent is never executed, fetched or logged.
"""

import binascii
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vila2.types import RepetitionRule, SamplingParams

IMAGE_MARK = "<image>"
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
SEED_LIMIT = 1 << 64

# Taken without effect: notes for whoever runs the server, and how OpenAI's own machines are to be used.
_NOTES = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
# Not done here. Values that ask for nothing pass.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_USED = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop",
     "stream", "stream_options", "min_tokens", "ignore_eos", "repetition", "siblings"}
)  # fmt: skip


class ApiError(Exception):
    """An answer that is an error, in OpenAI's words: an HTTP status, a type, the parameter and a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatLimits:
    """What one request may ask for. `max_new_tokens` is what it gets if it does not say."""

    model: str
    max_new_tokens: int
    max_images: int = 16
    repetition: RepetitionRule | None = field(default_factory=RepetitionRule)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that we can serve. `images` holds encoded bytes, in the order of their `<image>`s."""

    prompt: str
    images: tuple[bytes, ...]
    sampling: SamplingParams
    rng_key: int
    num_siblings: int = 1
    stream: bool = False
    include_usage: bool = False


def parse_chat(body: bytes, limits: ChatLimits) -> ChatRequest:
    """A request from its JSON. ApiError if it is none, or none that we serve."""
    fields = _parse_json(body)
    _check_fields(fields, limits.model)
    prompt, images = _parse_messages(fields.get("messages"), limits.max_images)
    stream = _flag(fields, "stream")
    options = fields.get("stream_options")
    if options is not None and (not stream or not isinstance(options, dict)):
        raise _bad("stream_options", "is an object, and only allowed with stream: true")
    seed = _integer(fields, "seed", -(1 << 63), SEED_LIMIT - 1)
    return ChatRequest(
        prompt=prompt,
        images=images,
        sampling=_sampling(fields, limits),
        rng_key=secrets.randbits(63) if seed is None else seed,
        num_siblings=_integer(fields, "siblings", 1, 64) or 1,
        stream=stream,
        include_usage=bool(options and options.get("include_usage")),
    )


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:100]}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check_fields(fields: dict[str, Any], model: str) -> None:
    for name, value in fields.items():
        if name in _USED or name in _NOTES:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"Unrecognized request argument supplied: {name[:64]}", param=name[:64],
                           code="unknown_parameter")  # fmt: skip
        if value is not None and value not in _NEUTRAL[name]:
            raise ApiError(400, f"{name} is not supported by this server: leave it out", param=name,
                           code="unsupported_parameter")  # fmt: skip
    asked = fields.get("model")
    if not isinstance(asked, str):
        raise _bad("model", f"is needed: this server has {model!r}")
    if asked != model:
        raise ApiError(
            404,
            f"The model {asked[:100]!r} does not exist: this server has {model!r}",
            param="model",
            code="model_not_found",
        )


def _sampling(fields: dict[str, Any], limits: ChatLimits) -> SamplingParams:
    """OpenAI's defaults where nothing is said: temperature 1, top-p 1, as long as there is room."""
    if fields.get("max_tokens") is not None and fields.get("max_completion_tokens") is not None:
        raise _bad("max_tokens", "and max_completion_tokens mean the same: give one")
    name = "max_tokens" if fields.get("max_tokens") is not None else "max_completion_tokens"
    longest = min(_integer(fields, name, 1, 1 << 31) or limits.max_new_tokens, limits.max_new_tokens)
    temperature = _number(fields, "temperature", 0, 2, 1.0)
    top_p = _number(fields, "top_p", 0, 1, 1.0)
    if top_p == 0:  # nothing but the likeliest token
        temperature, top_p = 0.0, 1.0
    top_k = _integer(fields, "top_k", -1, 1 << 31) or 0
    ignore_eos = _flag(fields, "ignore_eos")
    shortest = _integer(fields, "min_tokens", 0, 1 << 31) or 0
    if shortest > longest:
        raise _bad("min_tokens", f"{shortest} exceeds the {longest} tokens that this request may have")
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        max_new_tokens=longest,
        min_new_tokens=shortest,
        stop=_stops(fields.get("stop")),
        ignore_eos=ignore_eos,
        repetition=_repetition(fields, None if ignore_eos else limits.repetition),
    )


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise _bad("stop", f"must be a string, or a list of at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise _bad("stop", f"must hold strings of 1 to {MAX_STOP_CHARS} characters")
        _check_text(stop, "stop")
    return tuple(stops)


def _repetition(fields: dict[str, Any], default: RepetitionRule | None) -> RepetitionRule | None:
    if "repetition" not in fields:
        return default
    value = fields["repetition"]
    if value is None:
        return None
    names = ("max_period", "min_repeats", "min_tokens")
    if not isinstance(value, dict) or not value.keys() <= set(names):
        raise _bad("repetition", f"must be null, or an object of {', '.join(names)}")
    given = {name: _integer(value, name, 1, 1 << 16) for name in names}
    return RepetitionRule(**{name: number for name, number in given.items() if number is not None})


# ---- messages ----


def _parse_messages(messages: Any, max_images: int) -> tuple[str, tuple[bytes, ...]]:
    """The user's text and images. One turn: what these models are asked for is a caption of what they are shown."""
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "must be a list of one message or more")
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role != "user":
            raise _bad(f"messages[{place}].role", f"{str(role)[:32]!r} is not supported: one user message is")
    if len(messages) > 1:
        raise _bad("messages", f"holds {len(messages)} messages: this server takes one user message")
    return _parse_content(messages[0].get("content"), max_images)


def _parse_content(content: Any, max_images: int) -> tuple[str, tuple[bytes, ...]]:
    """Text in which `<image>` stands where a picture does, or nowhere if all of them come first."""
    where = "messages[0].content"
    if isinstance(content, str):
        _check_text(content, where)
        return content, ()
    if not isinstance(content, list) or not content:
        raise _bad(where, "must be a string or a list of parts")
    images: list[bytes] = []
    texts: list[str] = []
    pieces: list[str | None] = []  # None is an image
    for place, part in enumerate(content):
        here = f"{where}[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise _bad(f"{here}.text", "must be a string")
            _check_text(text, f"{here}.text")
            texts.append(text)
            pieces.append(text)
        elif kind == "image_url":
            if len(images) == max_images:
                raise _bad(here, f"is one image too many: {max_images} are allowed")
            images.append(_parse_image(part.get("image_url"), f"{here}.image_url"))
            pieces.append(None)
        else:
            raise _bad(f"{here}.type", f"{str(kind)[:32]!r} is not supported: text and image_url are")
    if None not in pieces[len(images) :]:
        return "\n".join(texts), tuple(images)
    return _interleaved(pieces), tuple(images)


def _interleaved(pieces: list[str | None]) -> str:
    """Each piece on a line of its own, as servers commonly join them."""
    return "\n".join(IMAGE_MARK if piece is None else piece.strip("\n") for piece in pieces)


def _parse_image(value: Any, where: str) -> bytes:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise _bad(f"{where}.url", "must be a data URL")
    head, comma, coded = url.partition(",")
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        shown = "a remote URL is never fetched" if "://" in head[:16] else "no data URL in base64"
        raise _bad(f"{where}.url", f"{shown}: send the image as data:image/jpeg;base64,...")
    try:
        return binascii.a2b_base64(coded)
    except ValueError as error:  # binascii.Error, or a character beyond ASCII
        raise _bad(f"{where}.url", f"is not base64: {error}") from None


# ---- values ----


def _bad(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param} {what}", param=param, code="invalid_value")


def _check_text(text: str, where: str) -> None:
    """JSON can hold halves of surrogate pairs, which are no text."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _bad(where, "holds half a surrogate pair") from None


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _bad(name, "must be true or false")


def _integer(fields: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _bad(name, f"must be an integer of {least} or more")
    return value


def _number(fields: dict[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise _bad(name, f"must be a number from {least} to {most}")
    return float(value)
