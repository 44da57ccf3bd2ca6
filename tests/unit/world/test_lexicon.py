"""What a text mentions: longest form first, plurals, numbers, and no false friends in our own texts."""

from importlib.resources import files

import pytest

from vila2.world import read_lexicon
from vila2.world.backgrounds import PATTERNS, SCENERY, TONES
from vila2.world.lexicon import COLORS, SIGN_WORDS, plural_of, with_article
from vila2.world.scene import PLACES
from vila2.world.texts.alt import _JUNK, _VAGUE

LEXICON = read_lexicon()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A dog.", {"dog": 1}),
        ("three apples", {"apple": 3}),
        ("three shiny apples", {"apple": 2}),  # an unknown word hides the number
        ("Three RED apples", {"apple": 3}),
        ("a hot dog", {"hot dog": 1}),
        ("a hot dog and a dog", {"hot dog": 1, "dog": 1}),
        ("two fire trucks", {"fire truck": 2}),
        ("a fire and a truck", {"fire": 1, "truck": 1}),
        ("dogs", {"dog": 2}),
        ("two puppies", {"dog": 2}),
        ("a kitten on a couch", {"cat": 1, "sofa": 1}),
        ("two fish", {"fish": 2}),
        ("fish", {"fish": 1}),
        ("five sheep", {"sheep": 5}),
        ("no dogs", {}),
        ("a dog on the left and a dog on the right", {"dog": 2}),
        ("a dog on the left. A dog is left of the cat. The dog is brown.", {"dog": 1, "cat": 1}),
        ("two apples and an apple", {"apple": 3}),
        ("4 cars", {"car": 4}),
        ("a red apple [010,020,300,400], a red apple [500,020,700,400]", {"apple": 2}),
        ("the dogs and the dog", {"dog": 2}),
        ("a cartoon of a carpet in a doghouse", {}),
        ("", {}),
    ],
)
def test_find(text: str, found: dict[str, int]) -> None:
    assert LEXICON.find(text) == found


def test_find_keeps_the_order_of_mention() -> None:
    assert list(LEXICON.find("a zebra, a cat and an apple")) == ["zebra", "cat", "apple"]


def test_every_form_is_found_as_its_name() -> None:
    for entry in LEXICON.entries:
        for form in (entry.name, *entry.synonyms):
            assert LEXICON.find(f"there is {with_article(form)} here") == {entry.name: 1}
            assert LEXICON.find(f"two {plural_of(form) if form != entry.name else entry.plural}") == {
                entry.name: 2
            }


def test_a_form_has_one_meaning() -> None:
    forms = [form for entry in LEXICON.entries for form in (entry.name, *entry.synonyms)]
    assert len(forms) == len(set(forms))


def test_the_other_words_of_our_texts_name_nothing() -> None:
    words = [*SIGN_WORDS, *COLORS, *PATTERNS, *SCENERY, *TONES, *PLACES, *_JUNK, *_VAGUE, "left of", "reads"]
    kinds = [kind for kinds in LEXICON.hypernyms.values() for kind in (*kinds, *map(plural_of, kinds))]
    for word in (*words, *kinds):
        assert LEXICON.find(word) == {}, word


def test_the_table_is_large_enough_and_varied() -> None:
    assert len(LEXICON.names) >= 150
    assert LEXICON.hypernyms["owl"] == ("bird", "animal")
    assert LEXICON.synonyms["dog"][0] == "puppy"
    assert LEXICON.plurals["leaf"] == "leaves"
    assert all(len(names) >= 3 for names in LEXICON.themes.values())
    assert 50 <= len(SIGN_WORDS) == len(set(SIGN_WORDS))
    assert all(3 <= len(word) <= 6 and word.isupper() and word.isalpha() for word in SIGN_WORDS)


@pytest.mark.parametrize("name", ["names.tsv", "fluent.webp", "flat.webp", "letters.png"])
def test_assets_are_part_of_the_package(name: str) -> None:
    assert (files("vila2.world") / "assets" / name).is_file()


def test_assets_are_small_and_licensed() -> None:
    folder = files("vila2.world") / "assets"
    assert sum(len(asset.read_bytes()) for asset in folder.iterdir() if asset.is_file()) < 3 << 20
    assert "MIT License" in (folder / "LICENSE-fluent-emoji.txt").read_text(encoding="utf-8")
    assert "Bitstream" in (folder / "LICENSE-dejavu.txt").read_text(encoding="utf-8")
