"""The settings of a world: every rate that shapes a scene or its alt-text is here, and nothing else is."""

from dataclasses import dataclass, field

from vila2.errors import UsageError
from vila2.world.lexicon import SIGN_WORDS, read_lexicon

SPLITS = ("pretrain", "instruct", "dev", "heldout")
MAX_LIGHT = 0.1  # beyond it, brightness would change what people call a colour
LEAST_OF_A_THEME = 6  # names, for scenes to be drawn from it
STYLES = {"fluent": "fluent.webp", "second": "flat.webp"}


@dataclass(frozen=True, slots=True)
class AltNoise:
    """How wrong the web is. `wrong` is for each name that an alt-text says; `vague` and `junk` for each text."""

    wrong: float = 0.15
    vague: float = 0.10
    junk: float = 0.10
    one_name: float = 0.55  # of the true and wrong texts: one name rather than two
    sign: float = 0.15  # of the scenes with a sign: the alt-text says its word

    def __post_init__(self) -> None:
        _rates(self, "wrong", "vague", "junk", "one_name", "sign")
        if self.vague + self.junk > 1:
            raise UsageError(
                f"alt-text cannot be vague ({self.vague}) and junk ({self.junk}) more than always"
            )


@dataclass(frozen=True, slots=True)
class WorldSettings:
    """What a world is made of. Scenes are in fractions of the image: only `render` looks at `image_size`."""

    image_size: int = 128
    seed: int = 0
    style: str = "fluent"
    object_counts: tuple[float, ...] = (0.22, 0.26, 0.24, 0.18, 0.10)  # how often 1, 2, ... objects
    repeat: float = 0.30  # of the scenes with two or more objects: a name comes again
    theme: float = 0.65  # of the scenes: names of one theme rather than any
    sign: float = 0.40
    flip: float = 0.5
    turn: float = 0.4
    light: float = 0.1  # brightness goes this far up or down
    themes: tuple[str, ...] = ()  # only names of these: a smaller world, in its questions and alt-texts too
    sign_words: int = len(SIGN_WORDS)  # how many of them signs may carry
    alt: AltNoise = field(default_factory=AltNoise)

    def __post_init__(self) -> None:
        if self.image_size < 16:
            raise UsageError(f"image_size must be at least 16, got {self.image_size}")
        if self.style not in STYLES:
            raise UsageError(f"no style {self.style!r}; there are {', '.join(STYLES)}")
        if (
            not 1 <= len(self.object_counts) <= 5
            or min(self.object_counts) < 0
            or sum(self.object_counts) <= 0
        ):
            raise UsageError(f"object_counts are 1 to 5 weights, got {self.object_counts}")
        _rates(self, "repeat", "theme", "sign", "flip", "turn")
        known = read_lexicon().themes
        for theme in self.themes:
            if theme not in known:
                raise UsageError(f"no theme {theme!r}; there are {', '.join(known)}")
        if self.themes and max(len(known[theme]) for theme in self.themes) < LEAST_OF_A_THEME:
            raise UsageError(
                f"themes {', '.join(self.themes)}: one of them needs {LEAST_OF_A_THEME} names or more"
            )
        if not 1 <= self.sign_words <= len(SIGN_WORDS):
            raise UsageError(f"sign_words must lie in [1, {len(SIGN_WORDS)}], got {self.sign_words}")
        if not 0 <= self.light <= MAX_LIGHT:
            raise UsageError(f"light must lie in [0, {MAX_LIGHT}], got {self.light}")


def _rates(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must lie in [0, 1], got {value}")
