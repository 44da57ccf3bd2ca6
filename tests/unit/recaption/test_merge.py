import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila2.recaption.merge import Merge, Merged, Turn, conversation, merge

NEW = (Turn("What is it?", " A dog. "), Turn("Where?", "On a beach."))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("replace", Merged("A dog.\nOn a beach.")),
        ("concat", Merged("my dog\nA dog.\nOn a beach.")),
        ("qa", Merged("my dog", (Turn("What is it?", "A dog."), Turn("Where?", "On a beach.")))),
    ],
)
def test_the_three_ways(how: Merge, expected: Merged) -> None:
    assert merge(" my dog\n", NEW, how) == expected


def test_concat_without_an_original_is_the_new_text() -> None:
    assert merge("", NEW[:1], "concat") == Merged("A dog.")


@pytest.mark.parametrize("how", ["replace", "concat", "qa"])
def test_nothing_new_is_nothing(how: Merge) -> None:
    assert merge("my dog", (), how) is None


def test_an_image_mark_in_a_text_is_no_image_to_a_trainer() -> None:
    merged = merge("see <image>", (Turn("q", "an <image> tag"),), "concat")
    assert merged == Merged("see <IMAGE>\nan <IMAGE> tag")


def test_questions_that_a_model_wrote_with_answers_become_turns_of_their_own() -> None:
    new = (Turn("Describe it.", "A dog."), Turn("Ask.", "Q: Where is <image>?\nA: left\nQ: Why?"))
    assert merge("my dog", new, "qa") == Merged(
        "my dog", (Turn("Describe it.", "A dog."), Turn("Where is <IMAGE>?", "left"))
    )
    assert merge("my dog", new[1:], "concat") == Merged("my dog\nQ: Where is <IMAGE>?\nA: left\nQ: Why?")
    assert merge("my dog", [Turn("Ask.", "Q: Where is it?")], "qa") is None


@pytest.mark.parametrize(
    "text",
    [
        "Q: Who?\nA: a cat,\n  asleep\nQ: Where?\nA: left",
        "Two questions:\n\n1. Question: Who?\n   Answer: a cat, asleep\n\n2. Question: Where?\n   Answer: left\n",
        "**Q1:** Who?\n**A1:** a cat, asleep\n- q: Where?\n- a: left\nQ: And when?",
        "Q: Who?\nA: a cat, asleep\nQ: lost\nQ: Where?\nA: left\nA: nothing was asked",
    ],
)
def test_conversations_in_the_forms_that_models_write(text: str) -> None:
    assert conversation(text) == (Turn("Who?", "a cat, asleep"), Turn("Where?", "left"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A dog on a beach.",
        "A: it begins with an answer\nQ: and asks later?\nA: yes",
        "A sign says\nQ: Who?\nA: me",
        "A sign.\nBelow it stands:\nQ: Who?\nA: me",
        "Quiet: the sea",
    ],
)
def test_a_caption_is_no_conversation(text: str) -> None:
    assert conversation(text) is None


@given(st.text(alphabet="QA:qa \n*1.)x", max_size=200))
def test_whatever_is_written_no_turn_is_empty(text: str) -> None:
    for turn in conversation(text) or ():
        assert turn.question.strip()
        assert turn.answer.strip()


plain = st.from_regex(r"[a-z]{1,8}( [a-z]{1,8}){0,4}", fullmatch=True)


@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=5))
def test_what_is_written_line_by_line_is_read_back(pairs: list[tuple[str, str]]) -> None:
    text = "\n".join(f"Q: {question}?\nA: {answer}" for question, answer in pairs)
    assert conversation(text) == tuple(Turn(f"{question}?", answer) for question, answer in pairs)
