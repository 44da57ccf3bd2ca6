"""The http backend against a server on this machine: what it sends, and what each answer and each fault becomes."""

import base64
import io
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.backends.faulty_server import Asked, Fault, FaultyServer, answer_to, completion, running
from vila2.backends import open_captioner
from vila2.backends.http_captioner import ImageEncoder, cut_loop, place_images
from vila2.config import RecaptionSettings, make_settings
from vila2.errors import UsageError, VilaError
from vila2.types import (
    Caption,
    CaptionRequest,
    ErrorKind,
    FinishReason,
    RepetitionRule,
    SampleError,
    SamplingParams,
    Status,
)

KEY = "sk-secret-0123456789"


def settings_for(*servers: FaultyServer, **values: Any) -> RecaptionSettings:
    base = {
        "source": "s",
        "out": "o",
        "backend": "http",
        "model": "m",
        "base_url": tuple(server.url for server in servers),
        "api_key_env": "TEST_HTTP_KEY",
    }
    return make_settings(RecaptionSettings, {**base, **values})


def image(seed: int, size: tuple[int, int] = (20, 30)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def run(
    servers: FaultyServer | tuple[FaultyServer, ...],
    count: int = 1,
    *,
    sampling: SamplingParams = SamplingParams(),
    prompt: str = "what",
    prompts: int = 1,
    **values: Any,
) -> list[Caption]:
    """Caption `count` images, with None between the requests now and then; captions in the order of the requests."""
    servers = servers if isinstance(servers, tuple) else (servers,)
    captioner = open_captioner(settings_for(*servers, **values))
    captioner.client.fleet.settings = _hasty(captioner)  # type: ignore[attr-defined]

    def requests() -> Iterator[CaptionRequest | None]:
        for i in range(count):
            prepared = captioner.prepare(image(i))
            for n in range(prompts):
                text = f"{prompt}{n}" if prompts > 1 else prompt
                number = i * prompts + n
                yield CaptionRequest(
                    number, text, (prepared,), sampling, ("s", i), prompts, rng_key=number + 7
                )
            if i % 5 == 4:
                yield None

    try:
        found: dict[int, Caption] = {}
        for caption in captioner.caption(requests()):
            assert caption.id not in found
            found[caption.id] = caption
    finally:
        captioner.close()
    assert sorted(found) == list(range(count * prompts))
    return [found[i] for i in sorted(found)]


def _hasty(captioner: Any) -> Any:
    """The same settings with waits that suit a test."""
    from dataclasses import replace

    fleet = captioner.client.fleet
    for server in fleet.servers:
        server._first_wait_s = 0.01
    return replace(fleet.settings, first_wait_s=0.01)


def expected(i: int, prompt: str = "what") -> str:
    asked = Asked(0, {"messages": [{"content": [
        {"type": "image_url", "image_url": {"url": ImageEncoder().encode(image(i)).url}},
        {"type": "text", "text": prompt},
    ]}]}, {}, "", 0.0, 0)  # fmt: skip
    return answer_to(asked)


# ---- what is sent ----


def test_a_request_as_the_server_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_HTTP_KEY", KEY)
    with running() as server:
        [caption] = run(server, max_new_tokens=9)
    assert caption == Caption(
        0, expected(0), finish_reason=FinishReason.STOP, num_prompt_tokens=11, token_count=2
    )
    assert caption.num_tokens == 2
    [asked] = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.body["model"] == "m"
    assert set(asked.body) == {"model", "messages", "max_tokens", "temperature"}
    assert asked.body["temperature"] == 0
    picture, text = asked.content
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert text == {"type": "text", "text": "what"}


def test_sampling_is_sent_as_far_as_it_is_asked_for() -> None:
    sampling = SamplingParams(0.7, 0.9, 5, 3, 40, 2, ("END",), True)
    with running() as server:
        run(server, sampling=sampling)
    body = server.asked[0].body
    sent = {name: value for name, value in body.items() if name not in ("model", "messages")}
    assert sent == {
        "max_tokens": 40, "min_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 7,
        "stop": ["END"], "ignore_eos": True,
    }  # fmt: skip


def test_png_keeps_every_pixel_and_a_size_is_the_longest_side() -> None:
    pixels = image(1, (30, 60))

    def decode(encoder: ImageEncoder) -> Image.Image:
        url = encoder.encode(pixels).url
        return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))

    assert np.array_equal(np.asarray(decode(ImageEncoder("png"))), pixels)
    assert decode(ImageEncoder("png", 20)).size == (20, 10)
    assert decode(ImageEncoder("jpeg", 60)).size == (60, 30)
    smooth = np.asarray(Image.fromarray(pixels).resize((240, 120), Image.Resampling.BICUBIC))
    jpeg = ImageEncoder().encode(smooth).url
    error = np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg.partition(",")[2]))), float) - smooth
    assert np.abs(error).mean() < 3


def test_images_stand_where_the_prompt_says() -> None:
    one, two = ImageEncoder().encode(image(0)), ImageEncoder().encode(image(1))
    parts = place_images("See <image>\nand <image>: same?", [one, two])
    assert [part.get("text") or part["image_url"]["url"] for part in parts] == [
        "See ", one.url, "and ", two.url, ": same?",
    ]  # fmt: skip
    assert [part["type"] for part in place_images("<image>", [one])] == ["image_url"]
    with running() as server:
        [caption] = run(server, prompt="<image> or <image>?")
    assert caption.error == SampleError(
        ErrorKind.BAD_PROMPT, "the prompt names 2 images as <image>, but has 1"
    )
    assert not server.asked


def test_prompts_of_an_image_go_to_one_server() -> None:
    with running(delay_s=0.005) as one, running(delay_s=0.005) as two:
        run((one, two), 24, prompts=3)
        images = [{asked.image for asked in server.asked} for server in (one, two)]
        assert len(one.asked) + len(two.asked) == 72
        assert len(images[0] & images[1]) <= 12  # an idle server takes what it can get
        assert images[0]
        assert images[1]


# ---- what an answer becomes ----


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        (completion(" A cat. "), ("A cat.", FinishReason.STOP)),
        (completion("A cat and", "length"), ("A cat and", FinishReason.LENGTH)),
        (completion("A cat STOP a dog"), ("A cat", FinishReason.STOP)),
        (completion("x", "repetition"), ("x", FinishReason.REPETITION)),
        (completion("a cat " * 30, "length"), ("a cat", FinishReason.REPETITION)),
        (completion(""), ("", FinishReason.STOP)),
        (completion("A cat.", "eos"), ("A cat.", FinishReason.STOP)),
        (completion([{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]), ("A cat.", FinishReason.STOP)),
    ],
    ids=str,
)  # fmt: skip
def test_answers(answer: dict[str, Any], caption: tuple[str, FinishReason]) -> None:
    sampling = SamplingParams(stop=("STOP",), repetition=RepetitionRule())
    answer["usage"] = None
    with running(answer=lambda _: answer) as server:
        [found] = run(server, sampling=sampling)
    assert (found.text, found.finish_reason) == caption
    assert (found.num_tokens, found.num_prompt_tokens) == (0, 0)


def test_loops_are_cut_where_they_begin() -> None:
    rule = RepetitionRule(max_period=4, min_repeats=3, min_tokens=6)
    assert cut_loop("Here is  a\ncat. b c b c b c", rule) == "Here is  a\ncat. b c"
    assert cut_loop("no loop here at all", rule) == "no loop here at all"
    assert cut_loop("", rule) == ""


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (completion("I will not.", "content_filter"), "I will not."),
        (completion("", refusal="Against the rules."), "Against the rules."),
        (completion("", "content_filter"), "a content filter"),
    ],
)
def test_a_filter_is_an_error_row_of_its_own_kind(answer: dict[str, Any], message: str) -> None:
    with running(answer=lambda _: answer) as server:
        [found] = run(server)
    assert found.status is Status.ERROR
    assert found.error == SampleError(ErrorKind.CONTENT_FILTER, message)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault(400, '{"error": {"message": "bad image"}}'), ErrorKind.REQUEST_REFUSED, "HTTP 400 bad image"),
        (
            Fault(400, '{"object": "error", "message": "This model\'s maximum context length is 9"}'),
            ErrorKind.PROMPT_TOO_LONG,
            "maximum context length is 9",
        ),
        (Fault(413, "<html><body>Entity too large</body></html>"), ErrorKind.REQUEST_REFUSED, "HTTP 413 Entity"),
        (Fault(422, '{"detail": "no"}'), ErrorKind.REQUEST_REFUSED, "HTTP 422 no"),
        (Fault(500, "boom"), ErrorKind.SERVER_ERROR, "no answer in 4 attempts, the last: HTTP 500 boom"),
        (Fault(how="close"), ErrorKind.SERVER_ERROR, "the connection broke"),
        (Fault(200, "{", how="cut"), ErrorKind.SERVER_ERROR, "the connection broke"),
        (Fault(200, "<html>Welcome</html>"), ErrorKind.SERVER_ERROR, "no chat completion: Welcome"),
        (Fault(200, "[" * 100_000), ErrorKind.SERVER_ERROR, "no chat completion"),
        (Fault(200, '{"choices": []}'), ErrorKind.SERVER_ERROR, "no chat completion"),
        (Fault(200, "x" * 9_000_000), ErrorKind.SERVER_ERROR, "more than 8388608 bytes"),
    ],
    ids=lambda value: value.body[:20] if isinstance(value, Fault) else None,
)  # fmt: skip
def test_a_request_that_the_server_always_fails_is_a_row_and_its_neighbours_are_fine(
    fault: Fault, kind: ErrorKind, words: str
) -> None:
    bad = expected(3)
    with running(decide=lambda asked: fault if answer_to(asked) == bad else None) as server:
        found = run(server, 8)
    assert found[3].error is not None
    assert found[3].error.kind is kind
    assert words in found[3].error.message
    assert len(found[3].error.message) < 400
    for i in (0, 1, 2, 4, 5, 6, 7):
        assert found[i].text == expected(i)
    tried = sum(answer_to(asked) == bad for asked in server.asked)
    assert tried == (4 if kind is ErrorKind.SERVER_ERROR else 1)


def test_a_server_that_stalls_is_left_after_the_timeout() -> None:
    with running(decide=lambda asked: Fault(how="stall") if asked.number in (2, 5) else None) as server:
        start = time.monotonic()
        found = run(server, 12, request_timeout=1.0)
    assert [caption.text for caption in found] == [expected(i) for i in range(12)]
    assert len(server.asked) >= 14
    assert time.monotonic() - start < 20


def test_the_name_of_the_length_is_the_server_s() -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."

    def decide(asked: Asked) -> Fault | None:
        return Fault(400, message) if "max_tokens" in asked.body else None

    with running(decide=decide) as server:
        found = run(server, 12)
    assert [caption.text for caption in found] == [expected(i) for i in range(12)]
    assert sum("max_tokens" in asked.body for asked in server.asked) == 1
    with running(decide=lambda _: Fault(400, message)) as server:
        [caption] = run(server)
    assert caption.error is not None
    assert len(server.asked) == 2


# ---- when it opens ----


def test_the_model_is_found_or_named() -> None:
    listed = {"data": [{"id": "vila-8b", "digest": "0123456789abcdef" * 2}, {"id": "vila-3b"}]}
    with running(models=listed) as server, running(models=None) as bare:
        captioner = open_captioner(settings_for(server, bare, model="vila-8b"))
        assert (captioner.model_name, captioner.model_digest) == ("vila-8b", "0123456789abcdef" * 2)
        captioner.close()
        captioner = open_captioner(settings_for(server, model="vila-3b"))
        other = open_captioner(settings_for(bare, model="vila-3b"))
        assert captioner.model_digest == other.model_digest
        captioner.close()
        other.close()
        with pytest.raises(UsageError, match=r"has no model 'vila-9b' .did you mean 'vila-"):
            open_captioner(settings_for(server, model="vila-9b"))
        with pytest.raises(UsageError, match="needs --model NAME; choose one of: vila-3b, vila-8b"):
            open_captioner(_without_model(server))
        with pytest.raises(UsageError, match="needs --model NAME; the server does not list any"):
            open_captioner(_without_model(bare))
    with running() as server:
        captioner = open_captioner(_without_model(server))
        captions = list(captioner.caption([CaptionRequest(0, "x", (captioner.prepare(image(0)),))]))
        captioner.close()
    assert captioner.model_name == "m"
    assert [caption.text for caption in captions] == [expected(0, "x")]
    assert server.asked[0].body["model"] == "m"


def _without_model(*servers: FaultyServer) -> RecaptionSettings:
    values = settings_for(*servers).model_dump(exclude={"model"}, exclude_defaults=True)
    return RecaptionSettings(**values)


def test_servers_with_other_weights_are_refused() -> None:
    lists = [{"data": [{"id": "m", "digest": digit * 32}]} for digit in "ab"]
    with (
        running(models=lists[0]) as one,
        running(models=lists[1]) as two,
        pytest.raises(UsageError, match="do not serve the same 'm'"),
    ):
        open_captioner(settings_for(one, two))


@pytest.mark.parametrize(
    "listed", [{"data": 3}, {"data": [{}]}, "[", {"data": [{"id": "m", "digest": "../x"}]}]
)
def test_an_odd_list_of_models_is_no_list(listed: Any) -> None:
    with running(models=listed) as server:
        captioner = open_captioner(settings_for(server))
        captioner.close()
        assert len(captioner.model_digest) == 32


def test_nobody_there_is_one_line_at_once() -> None:
    with running() as server:
        pass
    start = time.monotonic()
    with pytest.raises(VilaError, match=rf"{server.url}: cannot connect"):
        open_captioner(settings_for(server))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("has_key", [True, False])
def test_a_key_that_is_refused_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_key: bool
) -> None:
    monkeypatch.setenv("TEST_HTTP_KEY", KEY if has_key else "")
    caplog.set_level(logging.DEBUG)
    listed = Fault(401, f'{{"error": "bad key {KEY}"}}')
    with running(models=listed) as server, pytest.raises(VilaError) as caught:
        open_captioner(settings_for(server))
    hint = "the key in TEST_HTTP_KEY is not accepted" if has_key else "put the key into TEST_HTTP_KEY"
    assert hint in str(caught.value)
    with running(models=None, decide=lambda _: listed) as server, pytest.raises(VilaError) as caught:
        run(server, 30)
    assert hint in str(caught.value)
    assert len(server.asked) == 1
    if has_key:
        assert KEY not in str(caught.value)
        assert KEY not in caplog.text


def test_the_key_stays_out_of_captions_and_reprs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_HTTP_KEY", KEY)
    with running(answer=lambda _: completion(f"you sent {KEY}")) as server:
        [caption] = run(server)
        captioner = open_captioner(settings_for(server))
        shown = repr(captioner.client.fleet.secret) + captioner.description + str(captioner.stats())  # type: ignore[attr-defined]
        captioner.close()
    assert caption.text == "you sent ***"
    assert KEY not in shown


def test_a_key_that_fits_no_header_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_HTTP_KEY", "sk \u2026secret")
    with running() as server, pytest.raises(UsageError, match="the key in TEST_HTTP_KEY holds") as caught:
        open_captioner(settings_for(server))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://[::1"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(UsageError, match="base URL"):
        open_captioner(make_settings(RecaptionSettings, {
            "source": "s", "out": "o", "model": "m", "backend": "http", "base_url": [url],
        }))  # fmt: skip


def test_a_url_with_a_path_of_its_own_and_with_a_password() -> None:
    with running() as server:
        host = server.url.removeprefix("http://").removesuffix("/v1")
        for url in (f"http://{host}", f"http://{host}/v1/", f"http://{host}/v1/chat/completions"):
            captioner = open_captioner(settings_for(server, base_url=(url,)))
            assert f"http://{host}/v1," in captioner.description
            captioner.close()
        captioner = open_captioner(settings_for(server, base_url=(f"http://user:pw@{host}",)))
        list(captioner.caption([CaptionRequest(0, "x", (captioner.prepare(image(0)),))]))
        captioner.close()
    assert "pw" not in captioner.description
    assert server.asked[-1].headers["authorization"].startswith("Basic ")
