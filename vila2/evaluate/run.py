"""Ask a checkpoint about scenes of the world and score what it says.

All that is asked of a scene goes to the captioner as requests on one image, so it is encoded and prefilled once.
Greedy decoding: the same checkpoint, settings and machine give the same answers.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from vila2.backends import Captioner
from vila2.errors import UsageError, VilaError
from vila2.evaluate import metrics, parse
from vila2.evaluate.evaluation import Estimate, Evaluation, Record, estimate
from vila2.evaluate.tasks import CAPTIONS, METRICS, expand_tasks, score_answer, score_caption, task_of
from vila2.types import Caption, CaptionRequest, FinishReason, RepetitionRule, SamplingParams
from vila2.world import SPLITS, STYLES, Lexicon, Scene, World, WorldSettings, read_lexicon, texts
from vila2.world.texts import Question

MAX_ANSWER_TOKENS = 32
MAX_OBJECTS = len(WorldSettings().object_counts)

Observe = Callable[[int, int], None]  # scenes done, scenes in all


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request under way, and what its answer will be judged by."""

    order: int
    scene: Scene
    question: Question


def evaluate(
    checkpoint: str | Path,
    tasks: Sequence[str] = ("all",),
    *,
    split: str = "heldout",
    style: str = "fluent",
    scenes: int = 500,
    objects: tuple[int, int] | None = None,
    themes: Sequence[str] = (),
    sign_words: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    image_size: int | None = None,
    device: str = "auto",
    precision: str = "bf16",
    batch_size: int | None = None,
    threads: int | None = None,
    max_new_tokens: int = 192,
    captioner: Captioner | None = None,
    observe: Observe | None = None,
) -> Evaluation:
    """Evaluate a checkpoint on the first `scenes` scenes of a split, drawn in a style and at the checkpoint's own size.

    `tasks` are names of `vila2.evaluate.tasks` (TASKS and GROUPS); `objects` (fewest, most) passes over scenes with
    another number of objects, repeats of a name counted; `themes` and `sign_words` bound the world's names and the
    words of its signs; `limit` is the most questions a scene gets;
    `max_new_tokens` bounds a caption. `captioner`, if given, answers instead of the checkpoint, and stays open.
    UsageError for a name that does not exist, VilaError if a question cannot be asked (the model's context is short).
    """
    wanted = expand_tasks(tasks)
    if split not in SPLITS:
        raise UsageError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if style not in STYLES:
        raise UsageError(f"no style {style!r}; there are {', '.join(STYLES)}")
    if scenes < 1:
        raise UsageError(f"scenes must be at least 1, got {scenes}")
    fewest, most = objects or (1, MAX_OBJECTS)
    if not 1 <= fewest <= most <= MAX_OBJECTS:
        raise UsageError(f"scenes have 1 to {MAX_OBJECTS} objects, not {fewest} to {most}")
    opened = captioner or _open(checkpoint, device, precision, batch_size, threads, max_new_tokens)
    try:
        size = image_size or _native_size(opened)
        words: dict[str, Any] = {} if sign_words is None else {"sign_words": sign_words}
        world = World(WorldSettings(image_size=size, seed=seed, style=style, themes=tuple(themes), **words))
        started = time.perf_counter()
        run = _Run(opened, world, wanted, limit, max_new_tokens)
        every = (world.scene(split, index) for index in count())
        chosen = islice((scene for scene in every if fewest <= len(scene.objects) <= most), scenes)
        records = run.records(chosen, lambda done: observe and observe(done, scenes))
        seconds = time.perf_counter() - started
    finally:
        if captioner is None:
            opened.close()
    settings = {
        "tasks": list(wanted),
        "split": split,
        "style": style,
        "scenes": scenes,
        "objects": f"{fewest}-{most}",
        **({"themes": list(themes)} if themes else {}),
        **words,
        "seed": seed,
        "limit": limit,
        "image_size": size,
        "precision": precision,
        "max_new_tokens": max_new_tokens,
    }
    return Evaluation(
        checkpoint=str(checkpoint),
        model_digest=opened.model_digest,
        compute=opened.description,
        settings=settings,
        metrics=estimate(records, METRICS, seed)
        | diversity([r.reply for r in records if r.task == CAPTIONS]),
        records=tuple(records),
        seconds=seconds,
    )


def diversity(captions: Sequence[str]) -> dict[str, Estimate]:
    """How varied the captions are as a whole; figures of a set have no interval over its members."""
    if not captions:
        return {}
    tokens = [parse.words(caption) for caption in captions]
    values = {
        "diversity.unique": len(set(captions)) / len(captions),
        "diversity.distinct_1": metrics.distinct_n(tokens, 1),
        "diversity.distinct_2": metrics.distinct_n(tokens, 2),
        "diversity.self_bleu": metrics.self_bleu(tokens),
    }
    return {name: Estimate(value, None, None, len(captions), better="") for name, value in values.items()}


class _Run:
    """One evaluation under way. The captioner pulls requests as it has room: a scene is rendered when it is asked."""

    def __init__(
        self,
        captioner: Captioner,
        world: World,
        tasks: Sequence[str],
        limit: int | None,
        max_new_tokens: int,
    ) -> None:
        self.captioner, self.world, self.tasks, self.limit = captioner, world, tasks, limit
        rule = RepetitionRule()
        self.for_caption = SamplingParams(max_new_tokens=max_new_tokens, repetition=rule)
        self.for_answer = SamplingParams(max_new_tokens=MAX_ANSWER_TOKENS, repetition=rule)
        self.under_way: dict[int, _Asked] = {}
        self.begun = 0  # scenes
        self.left: dict[int, int] = {}  # scene -> answers to come

    def records(self, scenes: Iterable[Scene], observe: Callable[[int], object]) -> list[Record]:
        """One record for everything asked, by scene and then in the order of asking; observes the scenes done."""
        answered: list[tuple[int, Record]] = []
        for caption in self.captioner.caption(self._requests(scenes)):
            asked = self.under_way.pop(caption.id)
            answered.append((asked.order, _record(asked, caption, read_lexicon())))
            self.left[asked.scene.index] -= 1
            if not self.left[asked.scene.index]:
                del self.left[asked.scene.index]
                observe(self.begun - len(self.left))
        return [record for _, record in sorted(answered, key=lambda pair: pair[0])]

    def _requests(self, scenes: Iterable[Scene]) -> Iterator[CaptionRequest]:
        order = 0
        for scene in scenes:
            self.begun += 1
            questions = self._ask(scene)
            if not questions:
                continue  # none of the tasks applies to this scene
            self.left[scene.index] = len(questions)
            image = self.captioner.prepare(self.world.render(scene))
            for question in questions:
                self.under_way[order] = _Asked(order, scene, question)
                yield CaptionRequest(
                    id=order,
                    prompt=question.question,
                    images=(image,),
                    sampling=self.for_caption if question.task == CAPTIONS else self.for_answer,
                    image_key=scene.index,
                    num_siblings=len(questions),
                )
                order += 1

    def _ask(self, scene: Scene) -> list[Question]:
        """Everything asked of a scene; the wording for its caption goes round with its number."""
        asked = []
        if CAPTIONS in self.tasks:
            wordings = texts.CAPTION_PROMPTS["detailed"]
            wording = wordings[scene.index % len(wordings)]
            asked.append(Question(CAPTIONS, wording, texts.detailed_caption(scene), form="caption"))
        tasks = [task for task in self.tasks if task != CAPTIONS]
        return asked + (texts.questions(scene, tasks=tasks, limit=self.limit) if tasks else [])


def _record(asked: _Asked, caption: Caption, lexicon: Lexicon) -> Record:
    question, scene = asked.question, asked.scene
    if caption.error is not None:
        raise VilaError(
            f"scene {scene.key} ({question.task}): {caption.error.message}: this checkpoint cannot be evaluated"
        )
    if question.task == CAPTIONS:
        scores, expected = score_caption(caption.text, scene, lexicon.find), question.answer
        scores |= {"ended": 1.0, "cut": float(caption.finish_reason is not FinishReason.STOP)}
    else:
        scores, expected = score_answer(question, caption.text, lexicon.find)
    return Record(scene.index, task_of(question), question.question, expected, caption.text, scores)


def _open(
    checkpoint: str | Path,
    device: str,
    precision: str,
    batch_size: int | None,
    threads: int | None,
    max_new_tokens: int,
) -> Captioner:
    from vila2.backends.native import open_checkpoint

    return open_checkpoint(
        checkpoint,
        device=device,
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        max_new_tokens=max_new_tokens,
    )


def _native_size(captioner: Captioner) -> int:
    """The side that the model's processor would resize to: drawn at that, a scene loses nothing."""
    checkpoint = getattr(captioner, "checkpoint", None)
    return checkpoint.image_processor.image_size if checkpoint is not None else WorldSettings().image_size
