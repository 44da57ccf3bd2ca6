import pytest

from vila2.recaption.merge import Merge, Merged, Turn, merge

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
