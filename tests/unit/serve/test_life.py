"""A server under pressure and at its end: full, left by its clients, stopped, and with an engine that fails."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.unit.serve.kits import (
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
from vila2.errors import UsageError, VilaError
from vila2.serve.server import Server, ServeSettings, bind, is_public, read_key

LONG = {"max_tokens": 400, "ignore_eos": True}


def wait_for(condition: "object", seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def slow(captioner: SlowCaptioner, step_s: float) -> Iterator[None]:
    captioner.step_s = step_s
    try:
        yield
    finally:
        captioner.step_s = 0.0


def nothing_is_left(captioner: SlowCaptioner) -> bool:
    engine = captioner.engine
    return not (engine.num_unfinished or captioner._under_way or engine._encoded)


def _accepts(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))).close()
    except ConnectionError:
        return False
    return True


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_request_with_it(
    server: Server, captioner: SlowCaptioner, stream: bool
) -> None:
    aborted = metric(server, 'vila2_requests_total{outcome="aborted"}')
    free = captioner.engine.scheduler.pool.num_free
    with slow(captioner, 0.02):
        connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        content = json.dumps(body(stream=stream, **LONG)).encode()
        head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
        lines = "\r\n".join((*head, f"Content-Length: {len(content)}", "", ""))
        connection.sendall(lines.encode() + content)
        wait_for(lambda: captioner.engine.scheduler.running)
        connection.close()
        wait_for(lambda: nothing_is_left(captioner), 5)
    wait_for(lambda: metric(server, 'vila2_requests_total{outcome="aborted"}') == aborted + 1)
    wait_for(lambda: server.desk.num_inside == 0)
    assert captioner.engine.scheduler.pool.num_free >= free - 1  # the header may be kept
    assert text_of(post(server, body()))


def test_clients_that_go_while_they_wait_in_line(server: Server, captioner: SlowCaptioner) -> None:
    async def go() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            tasks = [
                asyncio.create_task(
                    client.post(f"{server.url}/v1/chat/completions", json=body(picture(png(n)), **LONG))
                )
                for n in range(40)
            ]
            while server.desk.num_inside < 40:
                await asyncio.sleep(0.01)
            for task in tasks[1:]:
                task.cancel()
            captioner.step_s = 0.0
            assert (await tasks[0]).json()["usage"]["completion_tokens"] == 400

    with slow(captioner, 0.02):
        asyncio.run(go())
    wait_for(lambda: nothing_is_left(captioner) and server.desk.num_inside == 0)
    assert server.desk._listeners == {}


def test_beyond_the_queue_there_is_429_and_a_time_to_come_back(checkpoint: Path) -> None:
    captioner = open_tiny(checkpoint, batch_size=2)
    with serving(captioner, max_queue=3) as server, ThreadPoolExecutor(5) as pool:
        captioner.step_s = 0.05
        jobs = [pool.submit(post, server, body(picture(png(n)), **LONG)) for n in range(5)]
        wait_for(lambda: server.desk.num_inside == 5)
        answer = post(server, body())
        assert error_of(answer)[::2] == (429, "rate_limit_exceeded")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        captioner.step_s = 0.0
        assert all(job.result().status_code == 200 for job in jobs)
        assert post(server, body()).status_code == 200
        assert metric(server, 'vila2_requests_total{outcome="busy"}') == 1


def test_bodies_beyond_the_memory_for_them_wait_outside(checkpoint: Path) -> None:
    captioner = open_tiny(checkpoint)
    with serving(captioner, max_body=20_000) as server, ThreadPoolExecutor(30) as pool:
        captioner.step_s = 0.05
        big = [body(picture(png(n, (60, 70)))) for n in range(30)]
        answers = list(pool.map(lambda fields: post(server, fields).status_code, big))
    assert set(answers) == {200, 429}


def test_a_stop_lets_requests_end(checkpoint: Path) -> None:
    captioner = open_tiny(checkpoint)
    captioner.step_s = 0.01
    with serving(captioner) as server, ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60) as client:
        client.get(f"{server.url}/health")
        job: Future[httpx.Response] = pool.submit(post, server, body(**{**LONG, "max_tokens": 60}))
        wait_for(lambda: captioner.engine.scheduler.running)
        server.stop()
        wait_for(lambda: not _accepts(server))
        assert job.result().json()["usage"]["completion_tokens"] == 60
        server.wait()
    assert nothing_is_left(captioner)
    assert not server.desk.engine._thread.is_alive()


def test_a_stop_waits_no_longer_than_it_is_told(checkpoint: Path) -> None:
    captioner = open_tiny(checkpoint)
    with serving(captioner, drain_s=1.0) as server, ThreadPoolExecutor(1) as pool:
        captioner.step_s = 0.2
        job = pool.submit(post, server, body(**LONG))
        wait_for(lambda: captioner.engine.scheduler.running)
        start = time.monotonic()
        server.stop()
        server.wait()
        assert time.monotonic() - start < 20
        assert isinstance(job.exception(), httpx.TransportError) or job.result().status_code >= 500


def test_an_engine_that_fails_ends_the_server_and_says_why(checkpoint: Path) -> None:
    captioner = open_tiny(checkpoint)
    server = Server(captioner, ServeSettings(name="tiny"), bind("127.0.0.1", 0))
    server.start()
    with ThreadPoolExecutor(2) as pool:
        captioner.step_s = 0.05
        jobs = [pool.submit(post, server, body(stream=stream, **LONG)) for stream in (False, True)]
        wait_for(lambda: len(captioner.engine.scheduler.running) == 2)
        wait_for(lambda: metric(server, "vila2_first_piece_seconds_count") == 1)
        captioner.failure = MemoryError("no memory\nis left")
        with pytest.raises(VilaError, match="the engine failed: MemoryError: no memory is left"):
            server.wait()
        whole, stream = (job.result() for job in jobs)
    assert error_of(whole)[0] == 500
    assert stream.status_code == 200
    last = [line for line in stream.text.splitlines() if line][-2:]
    assert json.loads(last[0].removeprefix("data: "))["error"]["type"] == "server_error"
    assert last[1] == "data: [DONE]"


def test_addresses_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UsageError, match=r"cannot listen at 127\.0\.0\.1 port"):
            bind("127.0.0.1", taken.getsockname()[1])
        assert not is_public(taken)
    with bind("0.0.0.0", 0) as anywhere:
        assert is_public(anywhere)
    with pytest.raises(UsageError, match="no address"):
        bind("no.such.host.invalid", 0)
    assert read_key(None, None) is None
    monkeypatch.setenv("SERVE_KEY", " abc ")
    assert read_key("SERVE_KEY", None) == "abc"
    (tmp_path / "key").write_text("def\n")
    assert read_key(None, tmp_path / "key") == "def"
    for text, words in (("", "there is no key in"), ("a b", "holds spaces")):
        (tmp_path / "key").write_text(text)
        with pytest.raises(UsageError, match=words):
            read_key(None, tmp_path / "key")
    with pytest.raises(UsageError, match="there is no key in NO_SUCH_KEY"):
        read_key("NO_SUCH_KEY", None)
    with pytest.raises(UsageError, match="cannot read the key: No such file"):
        read_key(None, tmp_path / "none")
