"""Texts: captions that say what is there, answers that are true, and alt-texts as wrong as the settings want."""

import re
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.config import load_recipe
from vila2.errors import UsageError
from vila2.world import SPLITS, STYLES, AltNoise, Scene, World, WorldSettings, read_lexicon, texts
from vila2.world.lexicon import COLORS, NUMBERS, with_article
from vila2.world.scene import PLACES, digits, place_of
from vila2.world.texts import Question
from vila2.world.texts.captions import MORE, RELATIONS

LEXICON = read_lexicon()
WORLDS = {style: World(WorldSettings(style=style)) for style in STYLES}
scenes = st.builds(
    lambda style, split, index: WORLDS[style].scene(split, index),
    st.sampled_from(list(STYLES)),
    st.sampled_from(SPLITS),
    st.integers(0, 10**9),
)


def some(count: int, split: str = "pretrain") -> list[Scene]:
    return [WORLDS["fluent"].scene(split, index) for index in range(count)]


def test_prompts_are_those_of_recaption() -> None:
    prompts = load_recipe(str(files("vila2.recaption") / "prompts.toml"))
    assert {name: tuple(table["texts"]) for name, table in prompts.items()} == texts.PROMPTS


@pytest.mark.parametrize("kind", ["detailed", "brief", "spatial", "grounding"])
@given(scene=scenes)
@settings(max_examples=120, deadline=None)
def test_captions_mention_what_is_there_and_nothing_else(kind: str, scene: Scene) -> None:
    assert LEXICON.find(texts.caption_for(scene, kind)) == scene.counts()


@pytest.mark.parametrize("related", texts.RELATED)
@pytest.mark.parametrize("kind", ["detailed", "spatial"])
@given(scene=scenes)
@settings(max_examples=120, deadline=None)
def test_captions_state_true_relations_places_and_colors(kind: str, related: str, scene: Scene) -> None:
    sentences = texts.caption_for(scene, kind, related).rstrip(".").split(". ")
    for name, count in scene.counts().items():
        group = [thing for thing in scene.objects if thing.name == name]
        form = LEXICON.plural(name, count)
        said = sentences[0].split(form, 1)[1] if form in sentences[0] else ""
        assert place_of(group[0].box) in said
        for color in COLORS:
            assert f"{color} {form}" not in sentences[0] or group[0].color == color
    for sentence in sentences[1:]:
        if sentence.startswith("The ") and not sentence.startswith("The setting"):
            predicate = next(p for p, words in RELATIONS.items() if f" is {words} the " in sentence)
            subject, other = sentence.removeprefix("The ").split(f" is {RELATIONS[predicate]} the ")
            assert scene.holds(subject, predicate, other) is True, sentence


def test_neighbours_are_related_in_the_order_in_which_they_are_named() -> None:
    told = 0
    for scene in some(300):
        opening, *sentences = texts.caption_for(scene, "spatial", "neighbours").rstrip(".").split(". ")
        places = []
        for sentence in sentences:
            if " is " in sentence:
                words = next(words for words in RELATIONS.values() if f" is {words} the " in sentence)
                pair = sentence.removeprefix("The ").split(f" is {words} the ")
                places.append([opening.index(f" {with_article(name)} ") for name in pair])
        turned = [pair if number % 2 == 0 else pair[::-1] for number, pair in enumerate(places)]
        assert turned == sorted(turned)
        assert all(first < second for first, second in turned)
        told += len(places)
    assert told > 200


def test_questions_about_places_have_true_answers_and_ask_each_way_twice_at_most() -> None:
    answers: Counter[str] = Counter()
    for scene in some(400):
        lines = texts.caption_for(scene, "spatial_questions").split("\n")
        told = [(q.removeprefix("Q: "), a.removeprefix("A: ")) for q, a in batched(lines)]
        assert 1 <= len(told) <= 6
        assert max(Counter(question.split()[0] for question, _ in told).values()) <= 2
        for question, answer in told:
            right = {
                q.question: q.answer for q in texts.questions(scene, tasks=["position", "relation", "count"])
            }
            assert right.get(question, answer) == answer
            answers[answer] += 1
            if found := re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", question):
                predicate = next(name for name, words in RELATIONS.items() if words == found[2])
                assert answer == ("yes" if scene.holds(found[1], predicate, found[3]) else "no")
            elif found := re.fullmatch(r"Where is the (.+), seen from the (.+)\?", question):
                assert scene.holds(found[1], answer, found[2])
            elif found := re.fullmatch(r"Which is (.+), the (.+) or the (.+)\?", question):
                predicate = next(name for name, words in MORE.items() if words == found[1])
                other = found[3] if answer == found[2] else found[2]
                assert scene.holds(answer, predicate, other)
    assert min(answers[word] for word in ("left", "right", "above", "below", "yes", "no")) > 3


def batched(lines: list[str]) -> list[tuple[str, str]]:
    return list(zip(lines[::2], lines[1::2], strict=True))


@given(scenes)
@settings(max_examples=120, deadline=None)
def test_signs_are_quoted_when_there_is_one(scene: Scene) -> None:
    for kind in ("detailed", "brief", "spatial", "grounding", "ocr"):
        text = texts.caption_for(scene, kind)
        if scene.sign is None:
            assert '"' not in text
        else:
            assert f'"{scene.sign.word}"' in text
    layout = texts.layout(scene)
    if scene.sign is None:
        assert "sign" not in layout
    else:
        sign = re.escape(digits(scene.sign.box))
        assert re.search(rf"sign {scene.sign.word} \d\d \d\d at {sign}", layout)


@given(scenes)
@settings(max_examples=120, deadline=None)
def test_the_layout_has_every_object_with_its_centre_and_box(scene: Scene) -> None:
    parts = texts.layout(scene).split("; ")
    assert parts[-1] == scene.background
    assert len(parts) == len(scene.objects) + (scene.sign is not None) + 1
    for thing in scene.objects:
        color = f" color {thing.color}" if thing.color else ""
        box = re.escape(digits(thing.box))
        (found,) = {
            m[0] for part in parts if (m := re.fullmatch(rf"{thing.name} .. .. at {box}{color}", part))
        }
        across, down = map(int, found.removeprefix(thing.name).split()[:2])
        x0, y0, x1, y1 = thing.box
        assert abs(across + 0.5 - 50 * (x0 + x1)) <= 0.501
        assert abs(down + 0.5 - 50 * (y0 + y1)) <= 0.501


def test_detailed_captions_are_compact() -> None:
    words = [len(texts.detailed_caption(scene).split()) for scene in some(1000)]
    assert 25 <= np.median(words) <= 45
    assert max(words) <= 60
    assert (
        len({texts.detailed_caption(scene).split(" a ")[0] for scene in some(60)}) > 3
    )  # more than one opening


def true_answer(scene: Scene, question: Question) -> bool:
    """Whether the answer is right, worked out from boxes and counts rather than as `questions` does."""
    answer, names = question.answer, question.names
    counts = scene.counts()
    if question.task.startswith("presence"):
        return answer == ("yes" if names[0] in counts else "no")
    if question.task == "count":
        return NUMBERS.index(answer) == counts[names[0]]
    if question.task == "reading":
        return scene.sign is not None and answer == scene.sign.word
    if question.task == "relation":
        predicate = question.predicate or ""
        holds = scene.holds(names[0], predicate, names[1])
        if question.form == "yes_no":
            return holds is (answer == "yes")
        return bool(holds) and answer == (names[0] if question.form == "name" else predicate)
    group = [thing for thing in scene.objects if thing.name == names[0]]
    if question.form == "name":
        return any(digits(thing.box) in question.question and thing.name == answer for thing in group)
    if len(group) != 1:
        return False
    truth = {"place": place_of(group[0].box), "box": digits(group[0].box), "color": group[0].color}
    return answer == truth[question.form]


@given(scenes)
@settings(max_examples=200, deadline=None)
def test_every_answer_is_true(scene: Scene) -> None:
    for question in texts.questions(scene):
        assert true_answer(scene, question), question
        assert len(question.answer.split()) <= 2
        allowed = {"yes_no": ("yes", "no"), "number": NUMBERS, "place": PLACES, "color": COLORS}
        assert question.answer in allowed.get(question.form, (question.answer,))


@given(scenes)
@settings(max_examples=100, deadline=None)
def test_presence_is_balanced(scene: Scene) -> None:
    for task in ("presence_random", "presence_popular", "presence_adversarial"):
        answers = Counter(q.answer for q in texts.questions(scene, [task]))
        assert answers["yes"] == answers["no"] == min(3, len(scene.counts()))


def test_adversarial_negatives_are_near_and_popular_ones_are_frequent() -> None:
    kinds, themes = ({e.name: getattr(e, field) for e in LEXICON.entries} for field in ("kind", "theme"))
    seen = Counter(name for scene in some(3000) for name in scene.counts())
    near: dict[str, list[bool]] = {}
    frequent: dict[str, list[int]] = {}
    for scene in some(300, "heldout"):
        for q in texts.questions(scene, ["presence_random", "presence_popular", "presence_adversarial"]):
            if q.answer == "no":
                name = q.names[0]
                close = [kinds[name] == kinds[o] or themes[name] == themes[o] for o in scene.counts()]
                near.setdefault(q.task, []).append(any(close))
                frequent.setdefault(q.task, []).append(seen[name])
    assert np.mean(near["presence_adversarial"]) == 1 > 0.7 > np.mean(near["presence_random"])
    assert np.mean(frequent["presence_popular"]) > 1.2 * np.mean(frequent["presence_random"])


def test_answers_cannot_be_guessed() -> None:
    asked = [q for scene in some(1500) for q in texts.questions(scene)]
    relations = Counter(q.answer for q in asked if q.task == "relation" and q.form == "yes_no")
    assert relations["yes"] / relations.total() == pytest.approx(0.5, abs=0.04)
    counts = Counter(q.answer for q in asked if q.task == "count")
    assert max(counts.values()) / counts.total() < 0.55
    places = Counter(q.answer for q in asked if q.task == "position")
    assert set(places) == set(PLACES)
    assert max(places.values()) / places.total() < 0.25
    assert {q.task for q in asked} == set(texts.TASKS)


def test_questions_by_task_and_limit() -> None:
    scene = some(1)[0]
    everything = texts.questions(scene)
    assert everything == texts.questions(scene)
    assert texts.questions(scene, ["color", "count"]) == [
        q for task in ("color", "count") for q in everything if q.task == task
    ]
    some_of_them = texts.questions(scene, limit=4)
    assert len(some_of_them) == 4
    assert set(some_of_them) <= set(everything)
    with pytest.raises(UsageError, match="presence_random"):
        texts.questions(scene, ["smell"])
    with pytest.raises(UsageError, match="detailed"):
        texts.caption_for(scene, "poem")


@given(scenes)
@settings(max_examples=200, deadline=None)
def test_alt_texts_are_what_their_kind_says(scene: Scene) -> None:
    alt = texts.alt_text(scene, AltNoise(wrong=0.4, vague=0.2, junk=0.2))
    named = set(LEXICON.find(alt.text))
    present = set(scene.counts())
    if alt.kind in ("vague", "junk"):
        assert not named
    elif alt.kind == "true":
        assert named
        assert named <= present
    else:
        assert named - present
    assert len(alt.text.split()) <= 12


def test_alt_text_rates_are_those_of_the_settings() -> None:
    noise = AltNoise(wrong=0.2, vague=0.15, junk=0.05, one_name=0.5)
    rates = texts.alt_rates(World(WorldSettings(alt=noise)), "pretrain", 3000)
    assert rates["vague"] == pytest.approx(0.15, abs=0.03)
    assert rates["junk"] == pytest.approx(0.05, abs=0.02)
    assert rates["true"] + rates["wrong"] + rates["vague"] + rates["junk"] == pytest.approx(1)
    # a scene of one name has one name in its alt-text, whatever one_name says
    assert 0.8 * 0.2 < rates["wrong"] < 0.8 * (1 - 0.8**2)
    clean = texts.alt_rates(World(WorldSettings(alt=AltNoise(0, 0, 0))), "pretrain", 300)
    assert clean["true"] == 1


def test_noise_changes_how_often_and_not_which_scene() -> None:
    scene = some(1)[0]
    assert texts.alt_text(scene) == texts.alt_text(scene, AltNoise())
    assert texts.alt_text(scene, AltNoise(junk=1, vague=0)).kind == "junk"
    with pytest.raises(UsageError):
        AltNoise(vague=0.7, junk=0.7)
    with pytest.raises(UsageError):
        AltNoise(wrong=-0.1)


def test_instructions_are_the_same_again_and_differ_by_split() -> None:
    assert texts.instruction("pretrain", 7) == texts.instruction("pretrain", 7)
    made = {split: [tuple(texts.instruction(split, index)) for index in range(50)] for split in SPLITS}
    assert len({tuple(turns) for turns in made.values()}) == len(SPLITS)
    assert all(1 <= len(turns) <= 3 for all_turns in made.values() for turns in all_turns)


def test_instructions_are_true() -> None:
    kinds = Counter()
    for index in range(1500):
        for question, answer in texts.instruction("instruct", index):
            words = question.split()
            kinds[words[0]] += 1
            if words[0] == "Spell":
                assert answer.replace(" ", "") == words[1].rstrip(".")
            elif words[0] == "Is" and " in this list: " in question:
                asked, listed = question.removeprefix("Is ").rstrip("?").split(" in this list: ")
                assert (asked in listed.split(", ")) == (answer == "yes")
            elif question.startswith("Which is "):
                kind = question.removeprefix("Which is ").split(":")[0].removeprefix("a ").removeprefix("an ")
                pair = question.split(": ")[1].rstrip("?").split(" or ")
                bare = {"clothing": "clothes", "part of nature": "nature"}.get(kind, kind)
                assert [name for name in pair if bare in LEXICON.hypernyms[name]] == [answer]
            elif ": how many " in question:
                listed, asked = question.rstrip("?").split(": how many ")
                count = sum(LEXICON.plurals[name] == asked for name in listed.split(", "))
                assert NUMBERS[count] == answer
    assert len(kinds) >= 5


def test_the_vocabulary_is_small() -> None:
    words: set[str] = set()
    for index, scene in enumerate(some(1500)):
        said = [
            texts.alt_text(scene).text,
            *(texts.caption_for(scene, kind) for kind in texts.CAPTION_PROMPTS),
        ]
        said += [word for q in texts.questions(scene) for word in (q.question, q.answer)]
        said += [word for turn in texts.instruction("pretrain", index) for word in turn]
        for text in said:
            words |= {word.strip('.,;:?"') for word in text.split() if not word.startswith(("[", '"['))}
    assert len(words) < 1200
