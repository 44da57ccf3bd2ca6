"""Captioners that know the truth: one that is always right, one that errs on purpose."""

from collections.abc import Callable

from tests.unit.recaption.fakes import FakeCaptioner
from vila2.types import Caption, CaptionRequest, FinishReason
from vila2.world import Scene, World, WorldSettings, texts

Twist = Callable[[Scene, str, str, str], str]  # scene, task, question, right answer -> what is said


def oracle(scenes: int, twist: Twist | None = None, split: str = "heldout") -> FakeCaptioner:
    """Answers everything about the first scenes of a split as the world does, changed by `twist`."""
    world = World(WorldSettings())
    answers: dict[tuple[int, str], str] = {}
    for index in range(scenes):
        scene = world.scene(split, index)
        asked = [
            ("captions", prompt, texts.detailed_caption(scene))
            for prompt in texts.CAPTION_PROMPTS["detailed"]
        ]
        asked += [(q.task, q.question, q.answer) for q in texts.questions(scene)]
        for task, question, answer in asked:
            answers[index, question] = twist(scene, task, question, answer) if twist else answer

    def answer(request: CaptionRequest) -> Caption:
        assert isinstance(request.image_key, int)
        text = answers[request.image_key, request.prompt]
        return Caption(request.id, text, finish_reason=FinishReason.STOP)

    return FakeCaptioner(answer, room=32)


def swap_yes_and_no(scene: Scene, task: str, question: str, answer: str) -> str:
    return {"yes": "no", "no": "yes"}.get(answer, answer)


def always_yes(scene: Scene, task: str, question: str, answer: str) -> str:
    return "Yes." if answer in ("yes", "no") else answer
