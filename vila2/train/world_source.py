"""Scenes of the synthetic world as documents, made when they are asked for.

What a scene gives is a list of texts. `alt` and, with `plain`, `detailed` and the other captions stand alone after the
image; otherwise each is the answer to its prompt. `questions` are independent one-turn conversations. `layout` puts the
scene's text layout in the place of its image; `instruction` has no scene at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from vila2.config import nearest
from vila2.errors import UsageError
from vila2.train.examples import Conversation, Document, LazyImage, SkippedDocument
from vila2.train.mixture import derived_seed

if TYPE_CHECKING:
    from vila2.world import Scene, World

CAPTIONS = ("detailed", "brief", "spatial", "grounding", "ocr", "spatial_questions")
TEXTS = ("alt", *CAPTIONS, "questions", "layout", "instruction")
_OPTIONS = ("plain", "tasks", "per_image", "related")
_AGAIN = "Say this again."


class WorldSource:
    """`scenes` None: without end. `options`: `plain`, `related` (captions), `tasks`, `per_image` (questions), and rates
    of the world."""

    def __init__(
        self,
        name: str,
        *,
        split: str,
        texts: Sequence[str],
        scenes: int | None = None,
        start: int = 0,
        image_size: int = 128,
        seed: int = 0,
        style: str = "fluent",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from vila2.world import texts as known

        unknown = next((text for text in texts if text not in TEXTS), None)
        if unknown is not None:
            raise UsageError(
                f"{name}: the world has no texts {unknown!r}{nearest(unknown, list(TEXTS))}: {', '.join(TEXTS)}"
            )
        if "instruction" in texts and len(texts) > 1:
            raise UsageError(f"{name}: instruction texts have no scene: give them a data entry of their own")
        options = dict(options or {})
        self.name, self.length = name, scenes
        self.split, self.texts, self.start = split, tuple(texts), start
        self.plain = bool(options.pop("plain", False))
        self.related = options.pop("related", "any")
        if self.related not in known.RELATED:
            raise UsageError(f"{name}: related is {self.related!r}, expected {' or '.join(known.RELATED)}")
        self.tasks = _names(options.pop("tasks", None))
        self.per_image: int | None = options.pop("per_image", None)
        self.world = _make_world(name, {"image_size": image_size, "seed": seed, "style": style, **options})
        self._looks = derived_seed("world", repr(self.world.settings))

    def document(self, index: int) -> Document:
        from vila2.world import texts

        number = self.start + index
        key = f"{self.name}/{self.split}/{number}"
        if self.texts == ("instruction",):
            turns = texts.instruction(self.split, number, self.world.settings.seed)
            return Document(key, "conversation", conversations=(tuple(turns),))
        scene = self.world.scene(self.split, number)
        captions, conversations = self._texts(scene)
        if "layout" in self.texts:
            return _in_words(key, texts.layout(scene), captions, conversations)
        if not captions and not conversations:
            raise SkippedDocument("no_text", f"{key}: nothing is asked about this scene")
        name = f"world {self._looks:016x} {self.split} {number}"
        image = LazyImage(partial(self.world.render, scene), name)
        if not captions:
            return Document(key, "conversation", (image,), conversations=tuple(conversations))
        text, *others = captions
        conversations = [*((("", other),) for other in others), *conversations]
        return Document(key, "caption", (image,), text, tuple(conversations))

    def _texts(self, scene: "Scene") -> tuple[list[str], list[Conversation]]:
        """The captions that stand alone, and the conversations."""
        from vila2.world import texts

        captions: list[str] = []
        conversations: list[Conversation] = []
        for kind in self.texts:
            if kind == "alt":
                captions.append(texts.alt_text(scene, self.world.settings.alt).text)
            elif kind in CAPTIONS:
                caption = texts.caption_for(scene, kind, self.related)
                if self.plain:
                    captions.append(caption)
                else:
                    wordings = texts.PROMPTS[kind]
                    draw = derived_seed(scene.seed, kind, scene.split, scene.index)
                    conversations.append(((wordings[draw % len(wordings)], caption),))
            elif kind == "questions":
                asked = texts.questions(scene, tasks=self.tasks, limit=self.per_image)
                conversations += [((item.question, item.answer),) for item in asked]
        return captions, conversations


def _in_words(key: str, layout: str, captions: list[str], conversations: list[Conversation]) -> Document:
    """The layout in the place of the image: before each first question, or alone where nothing is asked.

    One more text says the layout again: every token of it is an exercise in looking back, which answers about names and
    numbers need, and which 12,000 scenes of questions alone did not teach a small decoder.
    """
    if not captions and not conversations:
        return Document(key, "text", text=layout)
    told = [((f"{layout}\n{question}", answer), *later) for (question, answer), *later in conversations]
    told += [((layout, caption),) for caption in captions]
    told.append(((f"{layout}\n{_AGAIN}", layout),))
    return Document(key, "conversation", conversations=tuple(told))


def _names(value: Any) -> tuple[str, ...] | None:
    return None if value is None else (value,) if isinstance(value, str) else tuple(value)


def _make_world(name: str, options: dict[str, Any]) -> "World":
    """A world of these settings; the keys of `alt` (a table) are the rates of its alt-text."""
    from vila2.world import AltNoise, World, WorldSettings

    noise = options.pop("alt", {})
    for values, kind, extra in ((options, WorldSettings, _OPTIONS), (noise, AltNoise, ())):
        known = [*extra, *(field.name for field in fields(kind))]
        for key in values:
            if key not in known:
                raise UsageError(f"{name}: the world has no option {key!r}{nearest(key, known)}")
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }
    return World(WorldSettings(**plain, alt=AltNoise(**noise)))
