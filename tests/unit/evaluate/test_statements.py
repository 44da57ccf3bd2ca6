"""What captions state, with the world's own lexicon."""

import pytest

from vila2.evaluate import statements
from vila2.world import read_lexicon

find = read_lexicon().find


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("There is a cat and a dog. The cat is left of the dog.", ["cat", "dog", "cat", "dog"]),
        ("Two cats and a cat.", ["cat"]),
        ('A sign says "PIZZA" over a dog.', ["dog"]),
        ("A sign says PIZZA, over a dog.", ["dog"]),
        ("A SIGN AND A DOG", ["dog"]),  # all in capitals is no sign
        ("", []),
    ],
)
def test_mentions(text: str, names: list[str]) -> None:
    assert statements.mentions(text, find) == names


CAT_LEFT_OF_DOG = ("cat", "left", "dog")


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("The cat is left of the dog.", [CAT_LEFT_OF_DOG]),
        ("A cat sits to the left of a dog.", [CAT_LEFT_OF_DOG]),
        ("A cat, on the left side of the dog.", [CAT_LEFT_OF_DOG]),
        ("To the left of the dog is a cat.", [CAT_LEFT_OF_DOG]),
        (
            "The cat is to the right of the owl and above the dog.",
            [("cat", "right", "owl"), ("cat", "above", "dog")],
        ),
        ("The cat is left of the dog, which is above the owl.", [CAT_LEFT_OF_DOG, ("dog", "above", "owl")]),
        ("The cat is left of the dog, and the owl is below it.", [CAT_LEFT_OF_DOG]),
        (
            "The cat is left of the dog, and the owl is under the cat.",
            [CAT_LEFT_OF_DOG, ("owl", "below", "cat")],
        ),
        ("The cat is left of the dog. It is on top of the owl.", [CAT_LEFT_OF_DOG, ("cat", "above", "owl")]),
        ("There is a cat at the top left of the picture and a dog.", []),
        ("The cat is above the background.", []),
        ("A cat and a dog are on the left.", []),
        ("Turn left, cat, over there.", []),
        ("The cat is left of the cat.", []),
        ("", []),
    ],
)
def test_relations(text: str, stated: list[statements.Stated]) -> None:
    assert statements.relations(text, find) == stated


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('A sign reads "stop".', ["STOP"]),
        ("A sign reads STOP.", ["STOP"]),
        ('Signs: "OPEN", \u201cSALE\u201d', ["OPEN", "SALE"]),
        ("A CAT", []),
        ("A cat.", []),
    ],
)
def test_signs(text: str, said: list[str]) -> None:
    assert statements.signs(text) == said
