"""Answers of all sorts of models, and what they say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila2.evaluate import parse


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", True),
        ("yes.", True),
        ("Yes, there is a cat, not a dog.", True),
        ("No", False),
        ("No, there is none.", False),
        ("There is a cat in the picture.", True),
        ("There isn\u2019t a cat here.", False),
        ("There is no cat.", False),
        ("It does not show one. Yes?", False),
        ("The answer is yes", True),
        ("I can see a dog", True),
        ("", None),
        ("A cat.", None),
        ("Nothing to say", None),  # "nothing" is not "no"
        ("Noon has yellow eyes", None),
        ("...", None),
    ],
)
def test_yes_no(text: str, said: bool | None) -> None:
    assert parse.yes_no(text) is said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3", 3),
        ("Three.", 3),
        ("There are twelve apples.", 12),
        ("I count 2 or 3.", 2),
        ("none", 0),
        ("There are no apples.", 0),
        ("No, there are two.", 2),
        ("There is a single apple.", 1),
        ("an apple", 1),
        ("There is an apple", 1),
        ("apples are on a table", None),
        ("many", None),
        ("", None),
        ("9" * 50, 999999999),
    ],
)
def test_number(text: str, said: int | None) -> None:
    assert parse.number(text) == said


def test_every_number_word_is_read() -> None:
    assert [parse.number(word) for word in parse.NUMBER_WORDS] == list(range(21))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[012,034,500,600]", (0.012, 0.034, 0.5, 0.6)),
        ("It is at [ 0, 1 ,999,999 ].", (0.0, 0.001, 0.999, 0.999)),
        ("[500,034,012,600]", None),  # reversed
        ("[012,034,012,600]", None),  # empty
        ("[012,034,500,1000]", None),
        ("[012,034,500]", None),
        ("[0.1,0.2,0.3,0.4]", None),
        ("12,34,500,600", None),
        ("[1,2,3," + "9" * 5000 + "]", None),
        ("", None),
    ],
)
def test_box(text: str, said: parse.Box | None) -> None:
    assert parse.box(text) == said


corner = st.integers(0, 998)


@given(corner, corner, st.data())
def test_box_reads_what_the_world_writes(x: int, y: int, data: st.DataObject) -> None:
    from vila2.world.scene import digits

    right, bottom = data.draw(st.integers(x + 1, 999)), data.draw(st.integers(y + 1, 999))
    box = (x / 1000, y / 1000, right / 1000, bottom / 1000)
    assert parse.box(f"There: {digits(box)}.") == pytest.approx(box)


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    for read in (
        parse.yes_no,
        parse.number,
        parse.box,
        parse.place,
        parse.quoted,
        parse.reading,
        parse.words,
    ):
        read(text)
    parse.first_of(text, ("red",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('The sign says "OPEN".', ["OPEN"]),
        ("It reads 'STOP' and \u201cgo\u201d.", ["STOP", "go"]),
        ("The dog's bowl isn't here", []),
        ("the dogs' bowl and the cats' bed", []),
    ],
)
def test_quoted(text: str, said: list[str]) -> None:
    assert parse.quoted(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("STOP", "STOP"),
        ("stop.", "STOP"),
        ('It says "Stop"', "STOP"),
        ("The sign says STOP.", "STOP"),
        ("The word on the sign is: stop", "STOP"),
        ("", ""),
    ],
)
def test_reading(text: str, said: str) -> None:
    assert parse.normal_sign(parse.reading(text)) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("top left", "top left"),
        ("In the upper-right corner.", "top right"),
        ("at the bottom", "bottom"),
        ("on the left", "left"),
        ("in the middle", "center"),
        ("Lower middle", "bottom"),
        ("the centre", "center"),
        ("somewhere", None),
    ],
)
def test_place(text: str, said: str | None) -> None:
    assert parse.place(text) == said


def test_every_place_of_the_world_is_read() -> None:
    from vila2.world.scene import PLACES

    assert [parse.place(place) for place in PLACES] == list(PLACES)


def test_first_of_takes_the_first_and_knows_other_spellings() -> None:
    assert parse.first_of("It is grey, or blue.", ("blue", "gray"), {"grey": "gray"}) == "gray"
    assert parse.first_of("bluebell", ("blue",)) is None
