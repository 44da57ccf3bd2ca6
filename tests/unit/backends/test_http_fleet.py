"""Many requests over servers that fail in every way: none lost, none twice, none blamed for what the servers did."""

import re
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import pytest

from tests.unit.backends.faulty_server import Asked, Fault, FaultyServer, answer_to, completion, running
from vila2.backends.http_client import ChatClient, ChatReply, ChatSettings, RequestFailed
from vila2.backends.http_fleet import Server, backoff
from vila2.backends.http_wire import ExchangeError, Trouble, parse_base_url, parse_retry_after
from vila2.errors import VilaError

QUICK: dict[str, Any] = {"first_wait_s": 0.01, "timeout_s": 5.0, "patience_s": 20.0}


def client_of(*servers: FaultyServer, **settings: Any) -> ChatClient:
    return ChatClient(ChatSettings(tuple(s.url for s in servers), "m", "NO_KEY", **{**QUICK, **settings}))


def body(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": f"n{number}"}]}]}


def echo(asked: Asked) -> dict[str, Any]:
    return completion(asked.text)


def ask_all(client: ChatClient, count: int) -> list[str]:
    """The texts of `count` answers, each of which must be to its own question."""
    futures = [client.submit(body(i)) for i in range(count)]
    return [future.result(60).text for future in futures]


def names(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


# ---- the way there ----


def test_a_proxy_of_the_environment_is_used_but_not_for_names_that_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(answer=echo) as server:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1").removeprefix("http://"))
        settings = ChatSettings(("http://captions.invalid:81/v1",), "m", "NO_KEY", **QUICK)
        with ChatClient(settings) as client:
            assert client.submit(body(0)).result(60).text == "n0"
        assert server.asked[0].path == "http://captions.invalid:81/v1/chat/completions"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with client_of(server) as client:
            assert client.submit(body(1)).result(60).text == "n1"
        assert server.asked[1].path == "/v1/chat/completions"
    # What only one of the two libraries below can unpack must not be asked for.
    assert {asked.headers["accept-encoding"] for asked in server.asked} == {"gzip, deflate"}


# ---- balance ----


def test_load_goes_where_it_is_answered_sooner() -> None:
    with (
        running(answer=echo, delay_s=0.002) as fast,
        running(answer=echo, delay_s=1.0) as slow,
        client_of(fast, slow, max_in_flight=8) as client,
    ):
        assert ask_all(client, 60) == names(60)
    assert len(fast.asked) > len(slow.asked) > 0


def test_the_number_in_flight_is_bounded() -> None:
    with (
        running(answer=echo, delay_s=0.02) as one,
        running(answer=echo, delay_s=0.02) as two,
        client_of(one, two, max_in_flight=5) as client,
    ):
        assert ask_all(client, 60) == names(60)
        assert client.stats()["limit"] <= 5
    assert one.most_in_flight + two.most_in_flight <= 10
    assert max(asked.in_flight for asked in one.asked + two.asked) <= 5


def test_it_learns_what_a_server_takes() -> None:
    """More than 6 at once are refused: the limit ends near 6, and everything is answered."""
    with (
        running(
            answer=echo, delay_s=0.05, decide=lambda asked: Fault(429) if asked.in_flight > 6 else None
        ) as server,
        client_of(server) as client,
    ):
        assert ask_all(client, 100) == names(100)
        assert 1 <= client.stats()["limit"] <= 16
        assert client.stats()["busy"] < 50
    assert server.answered == Counter(names(100))


# ---- faults ----


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429), Fault(500), Fault(502, "<html>Bad gateway</html>"), Fault(503), Fault(200, "garbage"),
        Fault(200, "<html>"), Fault(200, '{"choices": [', how="cut"), Fault(how="close"),
        Fault(500, headers=(("retry-after", "0.02"),)),
    ],
    ids=lambda fault: f"{fault.status}{fault.how}{fault.body[:6]}",
)  # fmt: skip
def test_every_third_exchange_fails(fault: Fault) -> None:
    with (
        running(answer=echo, decide=lambda asked: fault if asked.number % 3 == 0 else None) as server,
        client_of(server, attempts=12) as client,
    ):
        assert ask_all(client, 40) == names(40)
        assert client.stats()["retries"] >= 15
    assert server.answered == Counter(names(40))


def test_one_server_of_two_fails_all_the_time() -> None:
    with (
        running(answer=echo, decide=lambda _: Fault(500)) as bad,
        running(answer=echo, delay_s=0.005) as good,
        client_of(bad, good, first_wait_s=0.05) as client,
    ):
        assert ask_all(client, 80) == names(80)
    assert good.answered == Counter(names(80))
    assert 5 <= len(bad.asked) < 40  # tripped: a probe now and then


def test_a_server_dies_under_load_and_comes_back() -> None:
    with running(answer=echo, delay_s=0.01) as server, client_of(server) as client:
        futures = [client.submit(body(i)) for i in range(150)]
        _wait_for(futures, 30)
        server.stop()
        time.sleep(0.3)
        assert not all(future.done() for future in futures)
        assert not any(future.exception() for future in futures if future.done())
        server.start()
        assert [future.result(60).text for future in futures] == names(150)
    assert set(server.answered) == set(names(150))


def test_half_of_the_fleet_dies_for_good() -> None:
    with (
        running(answer=echo, delay_s=0.01) as one,
        running(answer=echo, delay_s=0.01) as two,
        client_of(one, two) as client,
    ):
        futures = [client.submit(body(i)) for i in range(120)]
        _wait_for(futures, 20)
        one.stop()
        assert [future.result(60).text for future in futures] == names(120)
        one.start()


def test_a_failing_server_is_not_blamed_on_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything fails for a while, each request more often than one may: all are answered in the end."""
    monkeypatch.setattr("vila2.backends.http_fleet.LONGEST_WAIT_S", 0.02)
    sick = threading.Event()
    sick.set()
    with (
        running(answer=echo, decide=lambda _: Fault(500) if sick.is_set() else None) as server,
        client_of(server, attempts=2) as client,
    ):
        futures = [client.submit(body(i)) for i in range(20)]
        deadline = time.monotonic() + 20
        while max(Counter(asked.text for asked in server.asked).values(), default=0) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not any(future.done() for future in futures)
        sick.clear()
        assert [future.result(60).text for future in futures] == names(20)


def test_a_request_is_blamed_if_it_alone_fails() -> None:
    with (
        running(answer=echo, decide=lambda asked: Fault(500) if asked.text == "n3" else None) as server,
        client_of(server) as client,
    ):
        futures = [client.submit(body(i)) for i in range(10)]
        with pytest.raises(RequestFailed, match=r"no answer in 4 attempts, the last: HTTP 500") as caught:
            futures[3].result(60)
        assert not caught.value.refused
        assert [f.result(60).text for i, f in enumerate(futures) if i != 3] == [
            n for n in names(10) if n != "n3"
        ]


# ---- the end ----


@pytest.mark.parametrize("fault", [Fault(500, "dead"), Fault(503, "dead"), Fault(how="close"), None])
def test_a_dead_server_ends_the_run_with_one_line(fault: Fault | None) -> None:
    with running(answer=echo, decide=lambda _: fault) as server, client_of(server, patience_s=0.5) as client:
        if fault is None:
            assert ask_all(client, 5) == names(5)
            server.stop()
        futures = [client.submit(body(i)) for i in range(20)]
        for future in futures:
            with pytest.raises(
                VilaError, match=rf"^no answer since \d+ s, the last: {server.url}: "
            ) as caught:
                future.result(60)
            assert "\n" not in str(caught.value)
        with pytest.raises(VilaError, match="no answer since"):  # whoever comes late is told at once
            client.submit(body(99)).result(60)
        if fault is None:
            server.start()


def test_all_of_several_dead_servers_are_counted() -> None:
    with running() as one, running() as two:
        pass
    with (
        client_of(one, two, patience_s=0.3) as client,
        pytest.raises(VilaError, match="none of 2 servers answers"),
    ):
        client.submit(body(0)).result(60)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(401, "who are you"), r"HTTP 401 who are you \(put the key into NO_KEY\)"),
        (
            Fault(404, '{"error": {"message": "model `m` does not exist"}}'),
            "HTTP 404 model `m` does not exist",
        ),
        (Fault(302, "", (("location", "http://x/v2"),)), "redirected to http://x/v2: give that URL"),
        (Fault(429, '{"error": {"code": "insufficient_quota", "message": "pay"}}'), "HTTP 429 pay"),
        (Fault(400, "top_k is not known"), "every request is refused, the last by .*top_k is not known"),
    ],
)
def test_what_no_request_can_pass_ends_the_run(fault: Fault, words: str) -> None:
    with running(decide=lambda _: fault) as server, client_of(server) as client:
        errors = [client.submit(body(i)).exception(60) for i in range(10)]
        assert isinstance(errors[-1], VilaError)
        assert re.search(words, str(errors[-1]))
    assert len(server.asked) <= 8


def test_a_404_in_the_middle_is_a_proxy_that_restarts() -> None:
    with (
        running(answer=echo, decide=lambda asked: Fault(404) if 5 <= asked.number < 9 else None) as server,
        client_of(server) as client,
    ):
        assert ask_all(client, 30) == names(30)


# ---- patience ----


def test_retry_after_is_honoured_for_the_whole_server() -> None:
    def decide(asked: Asked) -> Fault | None:
        return Fault(429, headers=(("retry-after", "0.6"),)) if asked.number == 4 else None

    with running(answer=echo, decide=decide) as server, client_of(server) as client:
        assert ask_all(client, 30) == names(30)
    gaps = [after.at - before.at for before, after in pairwise(server.asked)]
    assert max(gaps) > 0.5  # nothing was sent but what was on its way


def test_retry_after_beyond_patience_ends_the_run_at_once() -> None:
    fault = Fault(503, "maintenance", (("retry-after", "3600"),))
    start = time.monotonic()
    with (
        running(decide=lambda _: fault) as server,
        client_of(server) as client,
        pytest.raises(VilaError, match="HTTP 503 maintenance"),
    ):
        client.submit(body(0)).result(60)
    assert time.monotonic() - start < 5


def test_both_forms_of_retry_after() -> None:
    assert parse_retry_after("7") == 7
    assert parse_retry_after("0.5") == 0.5
    assert parse_retry_after("-3") == 0
    assert 55 < (parse_retry_after(formatdate(time.time() + 60, usegmt=True)) or 0) < 61
    for odd in (None, "", "soon", "nan", "Wed, 99 Foo 2020 00:00:00 GMT"):
        assert parse_retry_after(odd) is None


def test_waits_double_and_differ() -> None:
    waits = [backoff(1.0, times) for times in (1, 2, 3, 4)]
    for times, wait in enumerate(waits):
        assert 0.5 * 2**times <= wait <= 1.5 * 2**times
    assert len({backoff(1.0, 1) for _ in range(10)}) == 10
    assert backoff(1.0, 50) <= 45


# ---- one server's state, step by step ----


def server() -> Server:
    settings = ChatSettings(("http://x",), "m", first_wait_s=1.0)
    return Server(parse_base_url("http://x"), settings)


def test_a_breaker_trips_lets_one_probe_through_and_closes() -> None:
    one = server()
    fault = ExchangeError(Trouble.FAULT, "")
    for n in range(5):
        assert not one.tripped
        assert one.room(0.0) > 0
        one.failed(one.limit.begin(1), fault, float(n))
    assert one.tripped
    assert one.room(one.resumes_at - 0.01) == 0
    assert one.room(one.resumes_at) == 1
    one.in_flight = 1
    assert one.room(one.resumes_at) == 0
    first = one.resumes_at
    one.failed(one.limit.begin(1), fault, first)
    assert one.resumes_at > first
    one.in_flight = 0
    one.succeeded(one.limit.begin(1), 0.1)
    assert not one.tripped
    assert one.room(0.0) == one.limit.value


def test_a_refused_connection_trips_at_once_and_busy_never_does() -> None:
    one = server()
    one.failed(one.limit.begin(1), ExchangeError(Trouble.DOWN, ""), 0.0)
    assert one.tripped
    one = server()
    for n in range(20):
        one.failed(one.limit.begin(1), ExchangeError(Trouble.BUSY, ""), float(n))
    assert not one.tripped
    assert one.room(19.0) == 0


def test_an_answer_does_not_end_a_pause_that_was_asked_for() -> None:
    one = server()
    one.failed(one.limit.begin(1), ExchangeError(Trouble.BUSY, "", retry_after_s=10.0), 0.0)
    one.succeeded(one.limit.begin(1), 0.1)
    assert one.room(9.0) == 0
    assert one.room(10.0) > 0


def test_cancelled_requests_give_their_places_back() -> None:
    with running(answer=echo, delay_s=0.05) as one, client_of(one, max_in_flight=2) as client:
        futures = [client.submit(body(i)) for i in range(30)]
        time.sleep(0.03)
        for future in futures[:25]:
            future.cancel()
        assert [future.result(60).text for future in futures[25:]] == names(30)[25:]
        assert client.stats()["in_flight"] == 0
    client.close()  # once more


def test_settings_that_make_no_sense() -> None:
    settings = ChatSettings(("http://x",), "m")
    for wrong in ({"urls": ()}, {"attempts": 0}, {"max_in_flight": 0}):
        with pytest.raises(ValueError, match="at least"):
            replace(settings, **wrong)  # type: ignore[arg-type]


def _wait_for(futures: "list[Future[ChatReply]]", count: int) -> None:
    deadline = time.monotonic() + 30
    while sum(future.done() for future in futures) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_helper_tells_answers_apart() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:x;base64,aGk="}}]
    asked = Asked(0, {"messages": [{"content": parts}]}, {}, "", 0.0, 1)
    assert answer_to(asked).startswith("a: 8f434346648f")
