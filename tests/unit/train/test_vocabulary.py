"""The texts that a small model's tokenizer is learnt from."""

from hashlib import blake2b

import pytest

from vila2.train.vocabulary import world_corpus
from vila2.world import World, WorldSettings, texts

SMALL = WorldSettings(themes=("home", "farm"), sign_words=8)


def test_each_scene_gives_its_texts_in_one_order() -> None:
    world = World(SMALL)
    expected = []
    for index in range(3):
        scene = world.scene("pretrain", index)
        expected.append(texts.alt_text(scene, SMALL.alt).text)
        for kind, prompts in texts.CAPTION_PROMPTS.items():
            expected += [prompts[index % len(prompts)], texts.caption_for(scene, kind)]
        expected.append(texts.layout(scene))
        expected += [f"{q.question} {q.answer}" for q in texts.questions(scene, limit=8)]
    assert list(world_corpus(world, "pretrain", 3)) == expected


def test_instructions_follow_the_scene_that_has_their_number() -> None:
    world = World()
    without, with_them = (list(world_corpus(world, "instruct", 2, instructions=i)) for i in (False, True))
    told = [f"{asked} {answer}" for k in range(2) for asked, answer in texts.instruction("instruct", k)]
    assert told
    assert [text for text in with_them if text in told] == told
    assert [text for text in with_them if text not in told] == without


@pytest.mark.parametrize(
    ("settings", "split", "instructions", "digest"),
    [(WorldSettings(), "instruct", True, "a6e5fc1495c01928"), (SMALL, "pretrain", False, "ad2f6629edb4152d")],
)
def test_the_tokenizers_that_exist_were_learnt_from_these(
    settings: WorldSettings, split: str, instructions: bool, digest: str
) -> None:
    """nano's and the loops': a change of these texts changes what their recipes make, and wants their cards anew."""
    corpus = world_corpus(World(settings), split, 40, instructions=instructions)
    assert blake2b("\n".join(corpus).encode(), digest_size=8).hexdigest() == digest
