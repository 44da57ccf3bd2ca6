"""A judge behind a server on this machine: both orders, everything that is no verdict, retries, and the key."""

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluate.chat_server import Answer, Server, says, serve
from vila2.errors import UsageError, VilaError
from vila2.evaluate.chat import ChatClient, ChatSettings, Reply
from vila2.evaluate.judge import Judgement, Pair, judge, make_pairs, outcome_of, read_verdict

KEY = "sk-secret-0123456789"


def captions_of(body: dict[str, Any]) -> tuple[str, str]:
    """The two captions in the order in which the judge sees them."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    first, _, rest = text.partition("Caption 1:\n")[2].partition("\n\nCaption 2:\n")
    return first, rest.partition("\n\n")[0]


def prefers(choose: Callable[[str, str], str]) -> Callable[[dict[str, Any]], Answer]:
    return lambda body: says(choose(*captions_of(body)))


def ask(server: Server, pairs: list[Pair], **settings: Any) -> Judgement:
    chat = ChatSettings(
        server.url, "judge-1", key_variable="TEST_JUDGE_KEY", **{"first_wait_s": 0.01, **settings}
    )
    with ChatClient(chat) as client:
        return judge(pairs, client, workers=3)


def pairs_of(*captions: tuple[str, str]) -> list[Pair]:
    return [Pair(str(i), a, b) for i, (a, b) in enumerate(captions)]


def longer(first: str, second: str) -> str:
    return "[[1]]" if len(first) > len(second) else "[[2]]" if len(second) > len(first) else "[[TIE]]"


def test_both_orders_and_the_counts() -> None:
    pairs = pairs_of(("long caption", "short"), ("a", "bbb"), ("x", "yyy"), ("same", "size"))
    with serve(prefers(longer)) as server:
        result = ask(server, pairs)
    assert (result.pairs, result.wins_a, result.wins_b, result.ties, result.inconsistent) == (4, 1, 2, 1, 0)
    assert result.win_rate == pytest.approx((2 + 0.5) / 4)
    assert result.low is not None
    assert result.high is not None
    assert result.low < result.win_rate < result.high
    assert result.first_share == 0.5
    assert result.p == 1.0  # 1 against 2
    shown = sorted(captions_of(body) for body in server.requests)
    assert shown == sorted([pair for p in pairs for pair in ((p.a, p.b), (p.b, p.a))])
    assert server.paths[0] == "/v1/chat/completions"
    assert server.requests[0]["model"] == "judge-1"
    assert server.requests[0]["temperature"] == 0
    assert [one.key for one in result.judged] == ["0", "1", "2", "3"]


def test_a_judge_that_likes_what_comes_first_says_nothing() -> None:
    with serve(prefers(lambda first, second: "[[1]]")) as server:
        result = ask(server, pairs_of(("a", "b"), ("c", "d")))
    assert (result.ties, result.inconsistent, result.win_rate, result.first_share) == (2, 2, 0.5, 1.0)


def test_refusals_and_gibberish_are_counted_and_not_judged() -> None:
    def choose(first: str, second: str) -> str:
        if "bomb" in first + second:
            return "I'm sorry, but I can't compare these."
        return "Well." if "odd" in first else "[[1]]" if first == "good" else "[[2]]"

    with serve(prefers(choose)) as server:
        result = ask(server, pairs_of(("good", "bad"), ("bomb", "b"), ("odd", "fine")))
    assert (result.wins_a, result.refused, result.unreadable, result.pairs) == (1, 1, 1, 3)
    assert (result.win_rate, result.ties) == (0.0, 0)


def test_nothing_judged_has_no_win_rate() -> None:
    with serve(lambda body: says(None, refusal="I will not.")) as server:
        result = ask(server, pairs_of(("a", "b")))
    assert (result.refused, result.win_rate, result.low, result.first_share) == (1, None, None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[1]]", "first"),
        ("The second names more.\n\n[[2]]", "second"),
        ("Not [[1]]. On balance [[ tie ]]", "tie"),
        ("[[A]]", "first"),
        ("Both fine. [[C]]", "tie"),
        ("2", "second"),
        ("Reasons...\nVerdict: 1", "first"),
        ("**Better: Caption 2**", "second"),
        ("Tie.", "tie"),
        ("I cannot help with that.", "refused"),
        ("I\u2019m unable to view images.", "refused"),
        ("Unfortunately, I must decline", "refused"),
        ("I can't decide between them: [[TIE]]", "tie"),  # a verdict goes before what sounds like a refusal
        ("There are 2 dogs in caption 1 and none in the other", "unreadable"),
        ("[[3]]", "unreadable"),
        ("", "unreadable"),
    ],
)
def test_verdicts(text: str, said: str) -> None:
    assert read_verdict(Reply(text, refused=False)) == said
    assert read_verdict(Reply(text, refused=True)) == "refused"


@pytest.mark.parametrize(
    ("ab", "ba", "outcome"),
    [
        ("first", "second", "a"),
        ("second", "first", "b"),
        ("first", "first", "inconsistent"),
        ("second", "second", "inconsistent"),
        ("tie", "tie", "tie"),
        ("first", "tie", "a"),
        ("tie", "first", "b"),
        ("refused", "first", "refused"),
        ("unreadable", "refused", "refused"),
        ("tie", "unreadable", "unreadable"),
    ],
)
def test_outcomes(ab: Any, ba: Any, outcome: str) -> None:
    assert outcome_of((ab, ba)) == outcome


# What the judge sees


def test_the_judge_may_see_the_truth_and_the_image(tmp_path: Path) -> None:
    (tmp_path / "k.png").write_bytes(b"pixels")
    pairs = make_pairs({"k": "one", "z": "?"}, {"k": "two"}, {"k": ["A cat.", "One cat."]}, tmp_path)
    with serve(lambda body: says("[[1]]")) as server:
        ask(server, pairs)
    image, text = server.requests[0]["messages"][-1]["content"]
    assert image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    assert text["text"].startswith("What is known to be true of the image:\nA cat.\nOne cat.\n\nCaption 1:")
    assert captions_of(server.requests[0]) in (("one", "two"), ("two", "one"))


def test_pairs_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no key in common"):
        make_pairs({"a": "x"}, {"b": "y"})
    with pytest.raises(UsageError, match="has no image for 'a'"):
        make_pairs({"a": "x"}, {"a": "y"}, images=tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"x")
    assert (
        make_pairs({"photo.jpg": "x"}, {"photo.jpg": "y"}, images=tmp_path)[0].image == tmp_path / "photo.jpg"
    )


# The endpoint


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    script = [
        (429, "slow down", {"retry-after": "0.5"}),
        (503, "", {}),
        (500, "oops", {}),
        says("[[1]]"),
        says("[[2]]"),
    ]
    start = time.monotonic()
    with serve(lambda body: script.pop(0)) as server:
        result = ask(server, pairs_of(("a", "b")))
    assert (result.wins_a, result.retries) == (1, 3)
    assert time.monotonic() - start > 0.5
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


def test_a_server_that_stays_busy_is_an_error_with_the_reason() -> None:
    with serve(lambda body: (503, "still  loading", {})) as server, pytest.raises(VilaError) as caught:
        ask(server, pairs_of(("a", "b")), patience_s=0.2)
    assert str(caught.value).startswith("no answer since ")
    assert str(caught.value).endswith("HTTP 503 still loading")
    assert len(server.requests) > 2


def test_a_server_that_is_not_there_is_an_error() -> None:
    with serve(lambda body: says("")) as server:
        pass
    with pytest.raises(VilaError, match=r"no answer since \d+ s, the last: .*: cannot connect"):
        ask(server, pairs_of(("a", "b")), patience_s=0.1)


@pytest.mark.parametrize("has_key", [True, False])
def test_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, has_key: bool) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY if has_key else "")
    with serve(lambda body: (401, f"bad key {KEY}", {})) as server, pytest.raises(VilaError) as caught:
        ask(server, pairs_of(("a", "b")))
    message = str(caught.value)
    assert len(server.requests) == 1  # nothing to gain from asking again
    if has_key:
        assert KEY not in message
        assert "bad key ***" in message
        assert "the key in TEST_JUDGE_KEY is not accepted" in message
    else:
        assert "put the key into TEST_JUDGE_KEY" in message
        assert "authorization" not in server.headers[0]


def test_an_echoed_key_stays_out_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with serve(lambda body: says(f"you sent {KEY}. [[1]]")) as server:
        result = ask(server, pairs_of(("a", "b")))
    assert KEY not in str(result.to_json())
    with ChatClient(ChatSettings(server.url, "m", "TEST_JUDGE_KEY")) as client:
        assert KEY not in repr(client)


@pytest.mark.parametrize("body", ["<html>", {}, {"choices": []}, {"choices": [{"message": None}]}, []])
def test_what_is_no_completion_is_an_error(body: Any) -> None:
    with (
        serve(lambda _: (200, body, {})) as server,
        pytest.raises(VilaError, match="the answer is no chat completion"),
    ):
        ask(server, pairs_of(("a", "b")))


def test_answers_in_parts_and_content_filters() -> None:
    with serve(
        lambda body: says([{"type": "text", "text": "[["}, {"type": "text", "text": "1]]"}])
    ) as server:  # type: ignore[arg-type]
        assert ask(server, pairs_of(("a", "b"))).inconsistent == 1
    filtered = (200, {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}, {})
    with serve(lambda body: filtered) as server:
        assert ask(server, pairs_of(("a", "b"))).refused == 1


def test_the_url_may_be_the_whole_path_and_must_be_http() -> None:
    with serve(lambda body: says("[[1]]")) as server:
        server.url += "/chat/completions"
        assert ask(server, pairs_of(("a", "b"))).pairs == 1
    assert server.paths[0] == "/v1/chat/completions"
    with pytest.raises(UsageError, match="must begin with http"):
        ChatSettings("localhost:8000", "m")
    with pytest.raises(UsageError, match="no pair to judge"):
        ask(server, [])
