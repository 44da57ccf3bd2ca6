"""A world with ground truth: scenes of known objects, rendered on the fly, and true (or web-like) texts about them."""

from vila2.world.lexicon import Lexicon, read_lexicon
from vila2.world.scene import Background, Object, Relation, Scene, Sign
from vila2.world.settings import SPLITS, STYLES, AltNoise, WorldSettings
from vila2.world.world import World

__all__ = [
    "World",
    "WorldSettings",
    "AltNoise",
    "SPLITS",
    "STYLES",
    "Scene",
    "Object",
    "Sign",
    "Background",
    "Relation",
    "Lexicon",
    "read_lexicon",
]
