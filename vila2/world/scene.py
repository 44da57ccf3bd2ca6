"""The nouns of the world: a scene is its objects, its sign and its background, all in fractions of the image."""

from dataclasses import asdict, dataclass
from typing import Any

from vila2.world.lexicon import Lexicon, read_lexicon

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, each 0..1

PREDICATES = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
CLEARLY_APART = 0.18  # of the image side, between centres
ONE_AXIS = 1.6  # how much more along one axis than along the other
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True, slots=True)
class Object:
    """A drawn picture. `box` is tight around what is drawn; `color` is None where no colour prevails."""

    name: str
    box: Box
    color: str | None
    turn: int = 0  # degrees
    flip: bool = False
    light: float = 1.0

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, slots=True)
class Sign:
    """A panel with a word. `box` is the panel, border included."""

    word: str
    box: Box
    color: str  # of the panel
    face: int = 0


@dataclass(frozen=True, slots=True)
class Relation:
    """`subject` is `predicate` of `object`, clearly and along one axis."""

    subject: str
    predicate: str
    object: str


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind. `variant` and `shift` change the pixels, never the phrase."""

    pattern: str
    color: str
    variant: int = 0
    shift: float = 0.0

    @property
    def phrase(self) -> str:
        """`a blue striped background`, `a snowy field`."""
        if self.pattern == "scenery":
            return self.color
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.pattern} background"


@dataclass(frozen=True, slots=True)
class Scene:
    """All that is true of an image. `seed`, `split` and `index` made it and name it; `themes` bound its world's names
    (all, if there are none)."""

    seed: int
    split: str
    index: int
    style: str
    objects: tuple[Object, ...]
    sign: Sign | None
    backdrop: Background
    themes: tuple[str, ...] = ()

    @property
    def lexicon(self) -> Lexicon:
        """The names that its world has."""
        return read_lexicon(self.themes)

    @property
    def key(self) -> str:
        return f"{self.seed}/{self.split}/{self.index}"

    @property
    def background(self) -> str:
        return self.backdrop.phrase

    def counts(self) -> dict[str, int]:
        """Name -> how many, in the order of the objects."""
        counts: dict[str, int] = {}
        for thing in self.objects:
            counts[thing.name] = counts.get(thing.name, 0) + 1
        return counts

    def single(self, name: str) -> Object | None:
        """The object of that name if there is exactly one."""
        found = [thing for thing in self.objects if thing.name == name]
        return found[0] if len(found) == 1 else None

    def relations(self) -> list[Relation]:
        """Every unambiguous relation, in both directions, between names that occur once."""
        counts = self.counts()
        alone = [thing for thing in self.objects if counts[thing.name] == 1]
        found = []
        for a in alone:
            for b in alone:
                predicate = relation_between(a.box, b.box) if a is not b else None
                if predicate:
                    found.append(Relation(a.name, predicate, b.name))
        return found

    def holds(self, subject: str, predicate: str, other: str) -> bool | None:
        """Whether a stated relation is true; None where that cannot be said (a name absent, repeated, too close).

        Wider than `relations()`: a thing up and to the left is both above and left.
        """
        a, b = self.single(subject), self.single(other)
        if a is None or b is None or a is b:
            return None
        axis, sign = _AXIS[predicate]
        apart = sign * (b.center[axis] - a.center[axis])
        return True if apart >= CLEARLY_APART / 2 else False if apart <= 0 else None

    def truth(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "seed": self.seed,
            "split": self.split,
            "index": self.index,
            "style": self.style,
            "objects": [asdict(thing) for thing in self.objects],
            "counts": self.counts(),
            "sign": asdict(self.sign) if self.sign else None,
            "background": self.background,
            "relations": [[r.subject, r.predicate, r.object] for r in self.relations()],
            **({"themes": list(self.themes)} if self.themes else {}),
        }


_AXIS = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}


def relation_between(a: Box, b: Box) -> str | None:
    """Where `a` is, seen from `b`, if their centres are clearly apart along one axis and less along the other."""
    dx = (a[0] + a[2] - b[0] - b[2]) / 2
    dy = (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dx) >= CLEARLY_APART and abs(dx) >= ONE_AXIS * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= CLEARLY_APART and abs(dy) >= ONE_AXIS * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def place_of(box: Box) -> str:
    """Which ninth of the image the centre lies in."""
    column = min(int((box[0] + box[2]) * 1.5), 2)
    row = min(int((box[1] + box[3]) * 1.5), 2)
    return PLACES[row * 3 + column]


def place_margin(box: Box) -> float:
    """How far the centre is from the nearest line between ninths."""
    return min(abs((box[i] + box[i + 2]) / 2 - third / 3) for i in (0, 1) for third in (1, 2))


def intersection(a: Box, b: Box) -> float:
    """The shared area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def digits(box: Box) -> str:
    """`[012,300,340,700]`: x0, y0, x1, y1 in thousandths, 000 to 999."""
    return "[" + ",".join(f"{min(max(round(value * 1000), 0), 999):03d}" for value in box) + "]"
