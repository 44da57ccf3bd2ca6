"""Pieces of a text that grows token by token: joined they are the whole, and nothing is taken back."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from vila2.serve.text_stream import TextStream


def decode(tokens: Sequence[int]) -> str:
    """Tokens are bytes: a character may take several."""
    return bytes(tokens).decode("utf-8", "replace")


def final(text: str, stop: tuple[str, ...]) -> str:
    """As the captioner ends a text."""
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return (text[: min(ends)] if ends else text).strip()


def run(text: str, stop: tuple[str, ...] = (), cuts: Sequence[int] = ()) -> list[str]:
    data = text.encode()
    stream = TextStream(decode, stop)
    steps = sorted({*cuts, len(data)} if cuts else range(len(data) + 1))
    pieces = []
    for end in steps:
        pieces.append(stream.push(list(data[:end])))
        if any(one in decode(data[:end]) for one in stop):  # the engine ends it there
            break
    return [*pieces, stream.finish(final(decode(data[:end]), stop))]


def test_characters_of_several_tokens_come_whole() -> None:
    assert [piece for piece in run("a\u00e4\u20ac\U0001f600b") if piece] == [
        "a",
        "\u00e4",
        "\u20ac",
        "\U0001f600",
        "b",
    ]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert "".join(run("one END two", ("END",))) == "one"
    assert run("EN", ("END",))[-1] == "EN"
    pieces = run("a ENx", ("END",))
    assert "EN" not in "".join(pieces[:4])
    assert "".join(pieces) == "a ENx"


def test_space_at_the_ends_is_left_out() -> None:
    assert "".join(run("  a b \n")) == "a b"


def test_a_loop_that_was_cut_takes_nothing_back() -> None:
    stream = TextStream(decode)
    given_out = stream.push(list(b"a b a b a b "))
    assert given_out == "a b a b a b"
    assert stream.finish("a b") == ""


WORDS = st.text(alphabet="ab \u00e4\U0001f600", max_size=12)


@given(
    WORDS,
    st.lists(st.text(alphabet="ab \u00e4", min_size=1, max_size=3), max_size=2),
    st.lists(st.integers(0, 12)),
)
def test_pieces_are_the_whole(text: str, stop: list[str], cuts: list[int]) -> None:
    data = text.encode()
    pieces = run(text, tuple(stop), [cut for cut in cuts if cut <= len(data)])
    seen = "".join(pieces)
    end = len(data)
    for place in (
        sorted({*(cut for cut in cuts if cut <= len(data)), len(data)}) if cuts else range(len(data) + 1)
    ):
        if any(one in decode(data[:place]) for one in stop):
            end = place
            break
    assert seen == final(decode(data[:end]), tuple(stop))
