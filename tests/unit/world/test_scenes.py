"""Scenes: determinism, splits that share nothing, and truth that the pixels and the boxes bear out."""

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.errors import UsageError
from vila2.evaluate.truths import scene_of
from vila2.world import SPLITS, STYLES, AltNoise, Scene, World, WorldSettings, read_lexicon, texts
from vila2.world.lexicon import SIGN_WORDS
from vila2.world.scene import OPPOSITE, area, intersection, place_of
from vila2.world.signs import PANELS, cap_share
from vila2.world.splits import holder_of, pairs_of, split_of

WORLDS = {style: World(WorldSettings(image_size=120, style=style)) for style in STYLES}
scenes = st.builds(
    lambda style, split, index: WORLDS[style].scene(split, index),
    st.sampled_from(list(STYLES)),
    st.sampled_from(SPLITS),
    st.integers(0, 10**9),
)


def digest(world: World, split: str, count: int) -> str:
    made = hashlib.sha256()
    for index in range(count):
        scene = world.scene(split, index)
        made.update(repr(scene).encode() + world.render(scene).tobytes())
    return made.hexdigest()


def test_scenes_are_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.unit.world.test_scenes import *; "
        "print(digest(WORLDS['fluent'], 'dev', 20))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(WORLDS["fluent"], "dev", 20)


def test_scenes_do_not_depend_on_the_order_of_calls_or_on_image_size() -> None:
    large = World(WorldSettings(image_size=256))
    backwards = [WORLDS["fluent"].scene("dev", index) for index in (7, 3, 0)]
    assert backwards == [large.scene("dev", index) for index in (7, 3, 0)]


def test_seeds_and_splits_give_other_scenes() -> None:
    other = World(WorldSettings(seed=1))
    firsts = [repr(w.scene(s, 0).objects) for w in (WORLDS["fluent"], other) for s in SPLITS]
    assert len(set(firsts)) == len(firsts)


@given(scenes)
@settings(max_examples=150, deadline=None)
def test_boxes_lie_inside_and_apart(scene: Scene) -> None:
    boxes = [thing.box for thing in scene.objects] + ([scene.sign.box] if scene.sign else [])
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
    for number, thing in enumerate(scene.objects):
        x0, y0, x1, y1 = thing.box
        assert 0.14 <= max(x1 - x0, y1 - y0) <= 0.451
        assert scene.sign is None or intersection(thing.box, scene.sign.box) == 0
        for other in scene.objects[:number]:
            assert intersection(thing.box, other.box) <= 0.05 * min(area(thing.box), area(other.box))


@given(scenes)
@settings(max_examples=150, deadline=None)
def test_truth_agrees_with_the_boxes(scene: Scene) -> None:
    assert 1 <= len(scene.objects) <= 5
    assert sum(scene.counts().values()) == len(scene.objects)
    alone = {name for name, count in scene.counts().items() if count == 1}
    related = {(r.subject, r.object): r.predicate for r in scene.relations()}
    for (a, b), predicate in related.items():
        assert {a, b} <= alone
        first, second = scene.single(a), scene.single(b)
        assert first is not None
        assert second is not None
        axis = 0 if predicate in ("left", "right") else 1
        apart = second.center[axis] - first.center[axis]
        assert (apart if predicate in ("left", "above") else -apart) >= 0.179
        assert related[b, a] == OPPOSITE[predicate]
        assert scene.holds(a, predicate, b) is True
        assert scene.holds(a, OPPOSITE[predicate], b) is False


def test_holds_says_nothing_of_what_is_absent_or_repeated() -> None:
    world = WORLDS["fluent"]
    scene = next(
        s
        for s in (world.scene("dev", i) for i in range(500))
        if max(s.counts().values()) > 1 and len(s.counts()) > 1
    )
    repeated = max(scene.counts(), key=lambda name: scene.counts()[name])
    other = next(name for name in scene.counts() if name != repeated)
    assert scene.holds(repeated, "left", other) is None
    assert scene.holds(other, "left", "no such thing") is None
    assert scene.holds(other, "left", other) is None


@pytest.mark.parametrize(
    ("box", "place"),
    [((0, 0, 0.3, 0.3), "top left"), ((0.4, 0.4, 0.6, 0.6), "center"), ((0.8, 0.4, 1, 0.5), "right")],
)
def test_place_of(box: tuple[float, float, float, float], place: str) -> None:
    assert place_of(box) == place


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [64, 128, 301])
def test_boxes_are_tight_around_the_pixels(style: str, size: int) -> None:
    """What changes when an object is left out lies in its box and reaches each side of it."""
    world = World(WorldSettings(image_size=size, style=style))
    slack = 1 + 0.03 * size  # a faint rim of a picture may equal its background
    for index in range(12):
        scene = world.scene("heldout", index)
        thing = scene.objects[-1]
        without = Scene(scene.seed, scene.split, index, style, scene.objects[:-1], scene.sign, scene.backdrop)
        changed = (world.render(scene) != world.render(without)).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        wanted = np.array(thing.box) * size
        assert (np.abs(seen - wanted) <= slack).all(), (thing, seen, wanted)
        outside = np.array(
            [wanted[0] - seen[0], wanted[1] - seen[1], seen[2] - wanted[2], seen[3] - wanted[3]]
        )
        assert (outside <= 0.51).all()


@pytest.mark.parametrize("size", [16, 48, 120, 384])
def test_any_image_size(size: int) -> None:
    world = World(WorldSettings(image_size=size))
    image = world.render(world.scene("pretrain", 5))
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.std() > 3


def test_rendering_leaves_the_cached_background_alone() -> None:
    world = WORLDS["fluent"]
    scene = world.scene("dev", 3)
    first = world.render(scene)
    bare = Scene(scene.seed, "dev", 3, "fluent", (), None, scene.backdrop)
    before = world.render(bare)
    world.render(scene)[:] = 0
    assert (world.render(bare) == before).all()
    assert (world.render(scene) == first).all()


@given(scenes)
@settings(max_examples=150, deadline=None)
def test_a_scene_belongs_to_its_split_alone(scene: Scene) -> None:
    names = [thing.name for thing in scene.objects]
    assert split_of(names, scene.background) == scene.split
    holders = {holder_of(pair) for pair in pairs_of(names, scene.background)} - {None}
    assert holders == ({scene.split} if scene.split in ("dev", "heldout") else set())


def test_splits_share_no_composition() -> None:
    def compositions(split: str) -> set[tuple[str, ...]]:
        made = (WORLDS["fluent"].scene(split, index) for index in range(400))
        return {(*sorted(thing.name for thing in scene.objects), scene.background) for scene in made}

    seen = [compositions(split) for split in SPLITS]
    assert not any(seen[a] & seen[b] for a in range(4) for b in range(a))


def test_held_out_pairs_are_fixed() -> None:
    """Another choice of pairs would let models that were trained before it see held-out compositions."""
    names = sorted(WORLDS["fluent"].lexicon.names)
    held = {pair: holder for pair in pairs_of(names, "") if (holder := holder_of(pair))}
    share = {holder: count / len(pairs_of(names, "")) for holder, count in Counter(held.values()).items()}
    assert share == {"dev": pytest.approx(0.05, abs=0.005), "heldout": pytest.approx(0.05, abs=0.005)}
    assert hashlib.sha256(repr(sorted(held.items())).encode()).hexdigest()[:12] == "ec53fd41c3b9"


def test_rates_are_those_of_the_settings() -> None:
    world = WORLDS["fluent"]
    made = [world.scene("pretrain", index) for index in range(3000)]
    assert np.mean([scene.sign is not None for scene in made]) == pytest.approx(0.40, abs=0.04)
    counts = Counter(len(scene.objects) for scene in made)
    for number, wanted in enumerate(world.settings.object_counts, 1):
        assert counts[number] / len(made) == pytest.approx(wanted, abs=0.04)
    repeated = [max(scene.counts().values()) > 1 for scene in made if len(scene.objects) > 1]
    assert np.mean(repeated) == pytest.approx(0.30, abs=0.04)
    seen = Counter(name for scene in made for name in scene.counts())
    assert set(seen) == set(world.lexicon.names)
    assert max(seen.values()) < 8 * min(seen.values())  # some are more popular, none is rare


def test_things_of_a_theme_come_together() -> None:
    made = [WORLDS["fluent"].scene("pretrain", index) for index in range(1500)]
    themes = {entry.name: entry.theme for entry in WORLDS["fluent"].lexicon.entries}
    pairs = [pair for s in made if len(s.counts()) > 1 for pair in pairs_of(list(s.counts()), "")]
    together = np.mean([themes[a] == themes[b] for a, b in pairs])
    assert together > 0.35  # by chance it would be 0.07


def test_sign_letters_can_be_read_at_120_pixels() -> None:
    for index in range(300):
        sign = WORLDS["fluent"].scene("dev", index).sign
        if sign is not None:
            assert (sign.box[3] - sign.box[1]) * cap_share() * 120 >= 8.9, sign


def test_sign_colors_contrast() -> None:
    def luminance(tone: tuple[int, int, int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in tone]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for panel, letters in PANELS.values():
        low, high = sorted((luminance(panel), luminance(letters)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_styles_draw_the_same_names_differently() -> None:
    scene = WORLDS["fluent"].scene("dev", 1)
    other = Scene(scene.seed, "dev", 1, "second", scene.objects, scene.sign, scene.backdrop)
    difference = WORLDS["fluent"].render(scene).astype(int) - WORLDS["fluent"].render(other)
    assert np.abs(difference).mean() > 0.5


def test_colors_are_those_a_person_would_say() -> None:
    color = WORLDS["fluent"].pictures.color
    expected = {"fish": "blue", "cactus": "green", "lemon": "yellow", "carrot": "orange", "elephant": "gray"}
    expected |= {
        "horse": "brown",
        "flamingo": "pink",
        "eggplant": "purple",
        "cloud": "white",
        "rainbow": None,
    }
    assert {name: color(name) for name in expected} == expected
    assert WORLDS["second"].pictures.color("apple") == "red"


@pytest.mark.parametrize(
    "wrong",
    [{"image_size": 8}, {"style": "oil"}, {"sign": 1.5}, {"object_counts": ()}, {"light": 0.9}],
)
def test_settings_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        WorldSettings(**wrong)  # type: ignore[arg-type]


def test_unknown_splits_and_indices() -> None:
    with pytest.raises(UsageError, match="heldout"):
        WORLDS["fluent"].scene("test", 0)
    with pytest.raises(UsageError):
        WORLDS["fluent"].scene("dev", -1)


@pytest.mark.parametrize("style", STYLES)
def test_every_name_has_a_picture(style: str) -> None:
    """The sheets are made from names.tsv in its order: a name added without new sheets would show here."""
    pictures = WORLDS[style].pictures
    for name in WORLDS[style].lexicon.names:
        whole = pictures.picture(name, 0, False)[0]
        assert max(whole.size) >= 76
        assert np.asarray(whole)[..., 3].mean() > 25


def test_a_world_of_some_themes_has_no_other_names() -> None:
    themes = ("farm", "market")
    world = World(WorldSettings(themes=themes, sign_words=5, sign=0.8))
    names = set(world.lexicon.names)
    assert len(names) == 22
    seen, words = set[str](), set[str]()
    for split in ("pretrain", "dev"):
        for index in range(150):
            scene = world.scene(split, index)
            assert split_of([thing.name for thing in scene.objects], scene.background) == split
            seen |= {thing.name for thing in scene.objects}
            words |= {scene.sign.word} if scene.sign else set()
            asked = texts.questions(
                scene, tasks=("presence_random", "presence_popular", "presence_adversarial")
            )
            seen |= {name for question in asked for name in question.names}
            assert scene_of(scene.truth()).themes == themes
            said = read_lexicon().find(texts.alt_text(scene, AltNoise(wrong=1.0, vague=0, junk=0)).text)
            assert set(said) <= names
    assert seen == names
    assert words == set(SIGN_WORDS[:5])


def test_all_themes_are_said_by_none() -> None:
    assert "themes" not in World().scene("dev", 0).truth()
    with pytest.raises(UsageError, match="no theme 'farms'; there are"):
        WorldSettings(themes=("farms",))
    with pytest.raises(UsageError, match="needs 6 names or more"):
        WorldSettings(themes=("winter",))
    with pytest.raises(UsageError, match="sign_words must lie in"):
        WorldSettings(sign_words=0)
