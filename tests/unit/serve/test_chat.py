"""A request's JSON: what it becomes, and what each thing that is wrong with it is called."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila2.serve.chat import ApiError, ChatLimits, ChatRequest, parse_chat
from vila2.types import RepetitionRule, SamplingParams

LIMITS = ChatLimits("m", max_new_tokens=100, max_images=3)
IMAGE = {
    "type": "image_url",
    "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"png").decode()},
}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def parse(content: Any = "hello", **fields: Any) -> ChatRequest:
    fields = {"model": "m", "messages": [{"role": "user", "content": content}], **fields}
    return parse_chat(json.dumps(fields).encode(), LIMITS)


def refusal(content: Any = "hello", **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(content, **fields)
    assert caught.value.body()["error"]["message"]
    return caught.value


def test_defaults_are_those_of_openai() -> None:
    chat = parse()
    assert chat.prompt == "hello"
    assert chat.images == ()
    assert chat.sampling == SamplingParams(temperature=1.0, max_new_tokens=100, repetition=RepetitionRule())
    assert not chat.stream
    assert parse().rng_key != parse().rng_key  # without a seed nothing repeats


def test_sampling_is_mapped_field_by_field() -> None:
    chat = parse(
        temperature=0.5, top_p=0.9, top_k=7, seed=2**63 + 5, max_tokens=9, min_tokens=2, stop=["a", "b"], n=1,
        repetition={"max_period": 5, "min_repeats": 3, "min_tokens": 9}, siblings=3, stream=True,
        stream_options={"include_usage": True}, user="u", metadata={"a": "b"}, presence_penalty=0, logit_bias={},
        response_format={"type": "text"}, logprobs=None, tools=None,
    )  # fmt: skip
    assert chat.sampling == SamplingParams(
        0.5, 0.9, 7, max_new_tokens=9, min_new_tokens=2, stop=("a", "b"), repetition=RepetitionRule(5, 3, 9)
    )
    assert (chat.rng_key, chat.num_siblings, chat.stream, chat.include_usage) == (2**63 + 5, 3, True, True)
    assert parse(stop="x").sampling.stop == ("x",)
    assert parse(top_p=0).sampling.temperature == 0
    assert parse(top_k=-1).sampling.top_k == 0
    assert parse(max_completion_tokens=5).sampling.max_new_tokens == 5
    assert parse(max_tokens=5000).sampling.max_new_tokens == 100  # there is no more room
    assert parse(repetition=None).sampling.repetition is None
    greedy = parse(ignore_eos=True).sampling
    assert greedy.ignore_eos
    assert greedy.repetition is None  # whoever wants the full length wants it


def test_images_first_leave_the_text_alone_and_others_are_marked() -> None:
    assert parse([IMAGE, text("a <image>?")]).prompt == "a <image>?"
    assert parse([IMAGE, IMAGE, text("a"), text("b")]).prompt == "a\nb"
    chat = parse([text("see "), IMAGE, text("\nand"), IMAGE])
    assert chat.prompt == "see \n<image>\nand\n<image>"
    assert chat.images == (b"png", b"png")


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        ({"temperature": 2.1}, "from 0 to 2", "temperature"),
        ({"temperature": "1"}, "a number", "temperature"),
        ({"temperature": True}, "a number", "temperature"),
        ({"top_p": 1.01}, "from 0 to 1", "top_p"),
        ({"max_tokens": 0}, "an integer of 1", "max_tokens"),
        ({"max_tokens": 1.5}, "an integer", "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "give one", "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "9 exceeds", "min_tokens"),
        ({"top_k": -2}, "an integer", "top_k"),
        ({"seed": 2**64}, "an integer", "seed"),
        ({"stop": [""]}, "1 to 1024", "stop"),
        ({"stop": ["x"] * 65}, "at most 64", "stop"),
        ({"stop": 3}, "a string", "stop"),
        ({"stop": ["\ud800"]}, "surrogate", "stop"),
        ({"stream": 1}, "true or false", "stream"),
        ({"stream_options": {}}, "only allowed with stream", "stream_options"),
        ({"n": 2}, "not supported", "n"),
        ({"tools": [{}]}, "not supported", "tools"),
        ({"logprobs": True}, "not supported", "logprobs"),
        ({"presence_penalty": 0.5}, "not supported", "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "not supported", "response_format"),
        ({"temprature": 1}, "Unrecognized request argument supplied: temprature", "temprature"),
        ({"repetition": {"period": 1}}, "an object of", "repetition"),
        ({"siblings": 0}, "an integer", "siblings"),
        ({"model": 5}, "is needed", "model"),
        ({"messages": []}, "a list", "messages"),
        ({"messages": [1]}, "not supported", "messages[0].role"),
        ({"messages": [{"role": "system", "content": "x"}]}, "not supported", "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "one user message", "messages"),
        ({"messages": [{"role": "user"}]}, "a string or a list", "messages[0].content"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fields: dict[str, Any], words: str, param: str) -> None:
    error = refusal(**fields)
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert words in error.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}], "a remote URL is never fetched"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "a remote URL is never fetched"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png,abc"}}], "no data URL in base64"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,a"}}], "is not base64"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,\u00e4"}}], "is not base64"),
        ([{"type": "image_url", "image_url": {}}], "must be a data URL"),
        ([{"type": "input_audio"}], "'input_audio' is not supported"),
        ([{"type": "text"}], "must be a string"),
        ([text("\udc00")], "surrogate"),
        ([IMAGE] * 4, "one image too many: 3 are allowed"),
        ([], "a string or a list"),
        ("\ud800", "surrogate"),
        ([None], "not supported"),
    ],
)  # fmt: skip
def test_content_that_will_not_do(content: Any, words: str) -> None:
    error = refusal(content)
    assert error.status == 400
    assert words in error.message
    assert error.param is not None


def test_a_model_that_is_not_here() -> None:
    error = refusal(model="gpt")
    assert (error.status, error.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nan", b'{"seed": NaN}', b"[" * 100_000, b"\xff", b"9" * 5000]
)
def test_no_json(body: bytes) -> None:
    with pytest.raises(ApiError, match="JSON"):
        parse_chat(body, LIMITS)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.just("user"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
NAMES = [
    "messages",
    "n",
    "tools",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "repetition",
    "temperature",
    "zz",
]


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_whatever_comes_is_a_request_or_a_refusal(fields: dict[str, Any]) -> None:
    status = 400
    try:
        parse_chat(json.dumps({"model": "m", **fields}).encode(), LIMITS)
    except ApiError as error:
        status = error.status
    assert 400 <= status < 500
