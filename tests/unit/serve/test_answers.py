"""What a server answers: by httpx, and by the official client of OpenAI's API, which knows nothing of us."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.unit.serve.kits import (
    NAME,
    SlowCaptioner,
    body,
    error_of,
    metric,
    open_tiny,
    picture,
    png,
    post,
    serving,
    text_of,
)
from vila2.data.decode import DecodeLimits, decode_image
from vila2.serve.server import Server
from vila2.types import Caption, CaptionRequest, SamplingParams


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def native(checkpoint: Path, *requests: CaptionRequest) -> list[Caption]:
    """What the engine says by itself."""
    alone = open_tiny(checkpoint)
    found = {caption.id: caption for caption in alone.caption(iter(requests))}
    return [found[request.id] for request in requests]


def request(
    captioner: SlowCaptioner, number: int, *seeds: int, text: str = "What is it?", **sampling: float
) -> CaptionRequest:
    images = tuple(captioner.prepare(decode_image(png(seed)).pixels, len(seeds)) for seed in seeds)
    params = SamplingParams(**{"max_new_tokens": 8, **sampling})  # type: ignore[arg-type]
    return CaptionRequest(number, text, images, params, rng_key=number)


def test_answers_are_the_engines_own(server: Server, captioner: SlowCaptioner, checkpoint: Path) -> None:
    whole = native(
        checkpoint,
        request(captioner, 0, 0),
        request(captioner, 1, 1, 2),
        request(captioner, 2, 3, temperature=0.9, top_p=0.8),
        request(captioner, 3),
        request(captioner, 4, 5, 6, text="a\n<image>\nb\n<image>\nc"),
    )
    asked = [
        body(picture(png(0))),
        body(picture(png(1)), picture(png(2))),
        body(picture(png(3)), temperature=0.9, top_p=0.8, seed=2),
        {**body(), "messages": [{"role": "user", "content": "What is it?"}]},
        body(
            {"type": "text", "text": "a"},
            picture(png(5)),
            {"type": "text", "text": "b"},
            picture(png(6)),
            text="c",
        ),
    ]
    for fields, caption in zip(asked, whole, strict=True):
        answer = post(server, fields)
        assert text_of(answer) == caption.text
        assert answer.json()["usage"] == {
            "prompt_tokens": caption.num_prompt_tokens,
            "completion_tokens": caption.num_tokens,
            "total_tokens": caption.num_prompt_tokens + caption.num_tokens,
        }


def test_the_official_client(client: openai.OpenAI, server: Server) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == (NAME, "vila2-fast")
    assert len(model.digest) == 32  # type: ignore[attr-defined]
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")

    messages = body(picture(png(7)))["messages"]
    answer = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=12)
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    again = client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_completion_tokens=12
    )
    assert again.choices[0].message.content == choice.message.content
    assert again.id != answer.id

    stream = client.chat.completions.create(
        model=NAME,
        messages=messages,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert len(chunks) > 4  # it came in pieces
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage

    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        client.chat.completions.create(model=NAME, messages=messages, temperature=3)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4o", messages=messages)


def test_stop_strings_end_an_answer_before_them(server: Server) -> None:
    whole = text_of(post(server, body(max_tokens=24, repetition=None)))
    stop = whole[len(whole) // 2 :][:3]
    answer = post(server, body(max_tokens=24, repetition=None, stop=[stop]))
    assert text_of(answer) == whole[: whole.index(stop)].strip()
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    with httpx.stream("POST", f"{server.url}/v1/chat/completions",
                      json=body(max_tokens=24, repetition=None, stop=[stop], stream=True)) as stream:  # fmt: skip
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    said = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert said == text_of(answer)


def test_a_loop_is_cut_and_said_so(server: Server, captioner: SlowCaptioner) -> None:
    rule = {"max_period": 48, "min_repeats": 2, "min_tokens": 2}
    found = [
        post(server, body(picture(png(seed)), max_tokens=200, repetition=rule)).json() for seed in range(4)
    ]
    loops = [one["choices"][0] for one in found if one["choices"][0]["stop_reason"] == "repetition"]
    assert loops
    assert {choice["finish_reason"] for choice in loops} == {"stop"}


def test_many_at_once_share_the_batch(server: Server, captioner: SlowCaptioner) -> None:
    alone = [text_of(post(server, body(picture(png(seed)), max_tokens=40))) for seed in range(12)]
    before = captioner.engine.counters.steps
    with ThreadPoolExecutor(12) as pool:
        together = list(
            pool.map(lambda seed: text_of(post(server, body(picture(png(seed)), max_tokens=40))), range(12))
        )
    assert together == alone
    assert captioner.engine.counters.steps - before < 0.7 * before


def test_siblings_share_decoding_encoding_and_prefill(server: Server, captioner: SlowCaptioner) -> None:
    counters = captioner.engine.counters
    texts = ["What is it?", "Where is it?", "Who is it?"]
    alone = [text_of(post(server, body(picture(png(50)), text=text))) for text in texts]
    encoded = counters.images_encoded
    with ThreadPoolExecutor(3) as pool:
        ask = [pool.submit(post, server, body(picture(png(51)), text=text, siblings=3)) for text in texts]
        shared = [text_of(one.result()) for one in ask]
    assert counters.images_encoded == encoded + 1
    assert shared == [text_of(post(server, body(picture(png(51)), text=text))) for text in texts]
    assert len(alone) == 3


def test_what_is_wrong_costs_only_its_own_request(server: Server) -> None:
    good = text_of(post(server, body()))
    broken = png(0)[:200]
    wrong = [
        (body(picture(broken)), 400, "image 1 of 1: broken PNG", "corrupt_image"),
        (body(picture(png(0)), picture(b"no image at all")), 400, "image 2 of 2", "not_an_image"),
        (body(text="long " * 3000), 400, "context length: the prompt has", "context_length_exceeded"),
        (body(text="<image> <image> <image>"), 400, "names 3 images", "bad_prompt"),
        (body(n=3), 400, "n is not supported", "unsupported_parameter"),
        (b"{", 400, "not JSON", None),
    ]
    for fields, status, words, code in wrong:
        found = error_of(post(server, fields))
        assert (found[0], found[2]) == (status, code)
        assert words in found[1]
        assert text_of(post(server, body())) == good
    stream = post(server, body(picture(broken), stream=True))
    assert error_of(stream)[0] == 400  # before the stream has begun: an error as any other
    late = post(server, body(text="long " * 3000, stream=True))
    assert error_of(late)[0] == 400


def test_an_image_for_which_there_is_no_memory(
    server: Server, captioner: SlowCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(image: object, num_images: int = 1) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(captioner, "prepare", prepare)
        status, message, _ = error_of(post(server, body()))
    assert (status, message) == (500, "the request could not be prepared: MemoryError")
    assert post(server, body()).status_code == 200


def test_other_methods_paths_and_kinds_of_body(server: Server) -> None:
    assert error_of(httpx.get(f"{server.url}/v1/chat/completions"))[0] == 405
    assert error_of(httpx.get(f"{server.url}/nowhere"))[0] == 404
    plain = httpx.post(
        f"{server.url}/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}
    )
    assert error_of(plain)[0] == 415
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_metrics_count_what_happened(checkpoint: Path) -> None:
    with serving(open_tiny(checkpoint)) as server:
        post(server, body())
        post(server, body(stream=True))
        post(server, body(n=2))
        assert metric(server, 'vila2_requests_total{outcome="ok"}') == 2
        assert metric(server, 'vila2_requests_total{outcome="refused"}') == 1
        assert metric(server, "vila2_new_tokens_total") == 16
        assert metric(server, "vila2_engine_images_encoded_total") == 2
        assert metric(server, "vila2_request_seconds_count") == 2
        assert metric(server, "vila2_first_piece_seconds_count") == 1
        assert metric(server, "vila2_requests_inside") == 0
        assert "python_gc" not in httpx.get(f"{server.url}/metrics").text


def test_limits_on_bodies_and_images(checkpoint: Path) -> None:
    limits = DecodeLimits(max_pixels=5000, min_side=8)
    with serving(open_tiny(checkpoint), max_body=30_000, max_images=2, images=limits) as server:
        assert post(server, body()).status_code == 200
        status, _, code = error_of(post(server, body(picture(png(0, (80, 80))))))
        assert (status, code) == (400, "too_many_pixels")
        assert error_of(post(server, body(picture(png(0, (4, 40))))))[2] == "too_small"
        assert "one image too many" in error_of(post(server, body(*[picture(png(0))] * 3)))[1]
        large = json.dumps(body(text="x" * 40_000)).encode()
        assert error_of(post(server, large))[0] == 413
        chunked = httpx.post(f"{server.url}/v1/chat/completions", content=iter([large[:20_000], large[20_000:]]),
                             headers={"content-type": "application/json"})  # fmt: skip
        assert error_of(chunked)[0] == 413
        small = iter([json.dumps(body()).encode()])
        fine = httpx.post(
            f"{server.url}/v1/chat/completions", content=small, headers={"content-type": "application/json"}
        )
        assert fine.status_code == 200


def test_keys(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = "sk-very-secret-1234"
    with serving(open_tiny(checkpoint), key=key) as server:
        right = {"authorization": f"Bearer {key}"}
        assert post(server, body(), headers=right).status_code == 200
        for path in ("/v1/models", f"/v1/models/{NAME}", "/metrics"):
            assert httpx.get(server.url + path, headers=right).status_code == 200
            assert error_of(httpx.get(server.url + path))[0] == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        for header in (
            "",
            f"Bearer {key}x",
            f"Bearer {key[:-1]}",
            f"Basic {key}",
            "Bearer",
            key,
            "Bearer \u00e4",
        ):
            answer = post(server, body(), headers={"authorization": header.encode()})
            assert error_of(answer)[0] == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert key not in answer.text
        assert post(server, body()).status_code == 401
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            client.models.list()
        assert metric(server, 'vila2_requests_total{outcome="refused"}', headers=right) == 8
    ours = [
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpcore", "openai"))
    ]
    assert not any(key in line for line in ours)
    assert key not in repr(server)
