"""CIDEr against pycocoevalcap: recorded scores and tokens always, the library itself where it is installed."""

import json
import random
from pathlib import Path

import pytest

from vila2.evaluate.cider import cider, tokenize

RECORDED = json.loads((Path(__file__).parent / "cider_recorded.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", RECORDED["captions"])
def test_tokens_are_the_recorded_ones(key: str) -> None:
    texts = [RECORDED["captions"][key], *RECORDED["references"][key]]
    assert [" ".join(tokenize(text)) for text in texts] == RECORDED["tokens"][key]


def test_scores_are_the_recorded_ones() -> None:
    scores = cider(
        {key: tokenize(text) for key, text in RECORDED["captions"].items()},
        {key: [tokenize(text) for text in texts] for key, texts in RECORDED["references"].items()},
    )
    assert scores == pytest.approx(RECORDED["scores"], abs=1e-9)
    assert sum(scores.values()) / len(scores) == pytest.approx(RECORDED["mean"], abs=1e-9)


def random_corpus(seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    rng = random.Random(seed)
    words = [
        "a",
        "the",
        "dog",
        "cat",
        "red",
        "on",
        "left",
        "of",
        "two",
        "apples",
        "tree",
        "sits",
        "big",
        "small",
        "with",
        "sign",
    ]
    references = {
        str(i): [" ".join(rng.choices(words, k=rng.randint(1, 14))) for _ in range(rng.randint(1, 5))]
        for i in range(20)
    }
    captions = {
        key: rng.choice(texts) if rng.random() < 0.3 else " ".join(rng.choices(words, k=rng.randint(0, 14)))
        for key, texts in references.items()
    }
    return captions, references


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_pycocoevalcaps(seed: int) -> None:
    theirs = pytest.importorskip("pycocoevalcap.cider.cider")
    captions, references = random_corpus(seed)
    mean, scores = theirs.Cider().compute_score(references, {key: [text] for key, text in captions.items()})
    ours = cider(
        {key: text.split() for key, text in captions.items()},
        {key: [text.split() for text in texts] for key, texts in references.items()},
    )
    assert list(ours.values()) == pytest.approx(list(scores), abs=1e-9)
    assert sum(ours.values()) / len(ours) == pytest.approx(mean, abs=1e-9)


def test_the_reference_itself_scores_ten_and_another_text_nothing() -> None:
    captions = {"a": ["a", "cat", "on", "a", "mat"], "b": ["nothing", "in", "common"], "c": []}
    references = {
        "a": [["a", "cat", "on", "a", "mat"]],
        "b": [["two", "dogs", "run", "away"]],
        "c": [["three", "birds"]],
    }
    assert cider(captions, references) == pytest.approx({"a": 10.0, "b": 0.0, "c": 0.0})


def test_one_image_scores_nothing() -> None:
    assert cider({"a": ["cat"]}, {"a": [["cat"]]}) == {"a": 0.0}


def test_keys_must_match() -> None:
    with pytest.raises(ValueError, match="same keys"):
        cider({"a": ["cat"]}, {"b": [["cat"]]})
    with pytest.raises(ValueError, match="reference"):
        cider({"a": ["cat"]}, {"a": []})
    assert cider({}, {}) == {}
