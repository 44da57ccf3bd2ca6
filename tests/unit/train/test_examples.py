"""Documents to examples: what is shared, what is cut, what is skipped and why."""

import io

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.unit.train.kits import kit, picture
from vila2.train.examples import Document, LazyImage, SkippedDocument


def png(shade: int = 127, width: int = 20) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(picture(shade, width)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(*questions: str, images=(None,), answer: str = "A dog.") -> Document:
    pictures = tuple(picture() if image is None else image for image in images)
    return Document("k", "conversation", pictures, conversations=tuple(((q, answer),) for q in questions))


def decoded(of, row) -> str:
    return of.tokenizer.decode(row.token_ids[row.in_loss].tolist()).strip()


def test_captions_of_one_image_are_branches_of_one_prefix() -> None:
    of = kit("nvila")
    others = ((("", "Two dogs."),), (("  ", "A table."),))
    document = Document("k", "caption", (picture(),), "A red square.", others)
    example = of.encoder().encode(document)
    assert [decoded(of, branch) for branch in example.branches] == ["A red square.", "Two dogs.", "A table."]
    assert example.prefix.token_ids.tolist() == [-1] * 4
    assert not any(branch.in_loss[0] for branch in example.branches)


def test_a_caption_and_questions_have_headers_of_their_own_unless_the_template_is_plain() -> None:
    of = kit("nvila")
    document = Document("k", "caption", (picture(),), "A red square.", (((("What?", "A dog.")),),))
    examples = of.encoder().encode_all(document)
    assert [len(example.branches) for example in examples] == [1, 1]
    assert examples[0].prefix.token_ids.tolist() == [-1] * 4
    assert len(examples[1].prefix) > 4
    with pytest.raises(SkippedDocument, match="2 headers"):
        of.encoder().encode(document)
    together = of.encoder("plain").encode(document)
    assert [decoded(of, branch) for branch in together.branches] == ["A red square.", "A dog."]


def test_bytes_and_pixels_and_lazy_images_give_the_same_tiles() -> None:
    of = kit("vila15")
    encoder = of.encoder()
    tiles = [
        encoder.encode(ask("What?", images=(image,))).images[0].tiles
        for image in (picture(), png(), LazyImage(png), LazyImage(picture))
    ]
    assert all(np.array_equal(tiles[0], other) for other in tiles)
    assert tiles[0].shape == (1, 16, 16, 3)


def test_a_plan_loads_no_image_whose_size_does_not_matter() -> None:
    def load() -> bytes:
        raise AssertionError("loaded")

    (plan,) = kit("nvila").encoder().plan(ask("What?", "Where?", images=(LazyImage(load),)))
    assert plan.example.num_tiles == 1
    assert plan.example.num_rows == len(plan.example.prefix) + sum(map(len, plan.example.branches))


def test_tiles_are_counted_in_the_plan() -> None:
    encoder = kit("lite").encoder()
    (plan,) = encoder.plan(ask("What?", images=(picture(width=40),)))
    example = encoder.finish(plan)
    assert example.num_tiles == plan.example.num_tiles > 1
    assert (example.prefix.token_ids == -1).sum() == example.images[0].num_tokens
    assert encoder.cost(plan.example) == pytest.approx(
        example.num_rows + encoder.tile_rows * example.num_tiles
    )


def test_texts_without_images_share_what_they_begin_with() -> None:
    of = kit("nvila")
    layout = "A red square; a blue circle\n"
    conversations = tuple(((f"{layout}{q}", "yes"),) for q in ("What?", "Where?", "Whose dog is it?"))
    example = of.encoder().encode(Document("k", "conversation", conversations=conversations))
    assert "a blue circle" in of.tokenizer.decode(example.prefix.token_ids.tolist())
    assert not example.prefix.in_loss.any()
    for branch, turns in zip(example.branches, conversations, strict=True):
        alone = of.encoder().encode(Document("k", "conversation", conversations=(turns,)))
        assert len(alone.prefix) == 0
        rebuilt = np.concatenate([example.prefix.token_ids, branch.token_ids])
        assert rebuilt.tolist() == alone.branches[0].token_ids.tolist()
        assert not branch.in_loss[0]
        assert branch.in_loss.sum() == alone.branches[0].in_loss.sum()


def test_the_same_conversation_twice_keeps_its_whole_loss() -> None:
    of = kit("nvila")
    same = (("What?", "yes"),)
    example = of.encoder().encode(Document("k", "conversation", conversations=(same, same)))
    alone = of.encoder().encode(Document("k", "conversation", conversations=(same,)))
    labels = alone.branches[0].in_loss.sum()
    assert [branch.in_loss.sum() for branch in example.branches] == [labels, labels]
    assert not any(branch.in_loss[0] for branch in example.branches)


def test_a_branch_that_begins_with_the_loss_stands_alone() -> None:
    of = kit("vila15")
    # Without a newline after the mark, the answer follows the image at once.
    bare = ((("<image>", "A red square."),), (("<image>", "Two dogs."),))
    examples = of.encoder("raw").encode_all(Document("k", "conversation", (picture(),), conversations=bare))
    assert [len(example.branches) for example in examples] == [1, 1]
    assert all(example.branches[0].in_loss[0] for example in examples)


def test_images_are_repeated_where_conversations_begin_differently() -> None:
    of = kit("vila15")
    examples = of.encoder().encode_all(ask("Look: <image> What?", "<image> What?"))
    assert len(examples) == 2
    assert all(len(example.images) == 1 for example in examples)


def interleaved(text: str, *images, of="vila15", **options):
    document = Document("k", "interleaved", tuple(images), text)
    return kit(of).encoder(**options).encode(document)


def test_interleaved_text_sets_a_newline_after_each_image_and_learns_all_text() -> None:
    of = kit("vila15")
    example = interleaved("One dog  <image>  is here. <image>\nTwo dogs.", picture(1), picture(2))
    (row,) = example.branches
    expected = of.ids("One dog", specials=True) + [-1] * 4
    expected += of.ids("\nis here.") + [-1] * 4 + of.ids("\nTwo dogs.") + [2]
    assert row.token_ids.tolist() == expected
    assert row.in_loss.tolist() == [False] + [token != -1 for token in expected[1:]]
    assert len(example.prefix) == 0
    assert [int(image.tiles[0, 0, 0, 0]) for image in example.images] == [1, 2]


def test_images_that_no_text_follows_are_left_out() -> None:
    example = interleaved("One <image> dog. <image> \n <image>", picture(1), picture(2), picture(3))
    assert len(example.images) == 1
    assert (example.branches[0].token_ids == -1).sum() == 4


def test_images_without_marks_come_before_the_text() -> None:
    example = interleaved("A dog.", picture(1), picture(2), of="nvila")
    assert example.branches[0].token_ids[:4].tolist() == [-1] * 4
    assert (example.branches[0].token_ids == -1).sum() == 8


def test_a_long_branch_is_cut_and_counted() -> None:
    of = kit("nvila")
    long, short = (("What?", "dog " * 100),), (("What?", "dog"),)
    document = Document("k", "conversation", (picture(),), conversations=(long, short))
    full = of.encoder().encode(document)
    limit = len(full.prefix) + len(full.branches[1]) + 5
    (plan,) = of.encoder(max_tokens=limit).plan(document)
    assert plan.num_cut == 1
    assert plan.num_dropped == 0
    cut, whole = plan.example.branches
    assert len(plan.example.prefix) + len(cut) == limit
    assert cut.token_ids.tolist() == full.branches[0].token_ids[: len(cut)].tolist()
    assert whole.token_ids.tolist() == full.branches[1].token_ids.tolist()


def test_what_is_left_without_a_loss_is_dropped() -> None:
    of = kit("nvila")
    document = Document(
        "k", "conversation", (picture(),), conversations=((("dog " * 200, "yes"),), (("What?", "yes"),))
    )
    (plan,) = of.encoder(max_tokens=120).plan(document)
    assert (plan.num_cut, plan.num_dropped, len(plan.example.branches)) == (1, 1, 1)
    with pytest.raises(SkippedDocument, match="nothing to learn within 20 tokens") as skipped:
        of.encoder(max_tokens=20).plan(document)
    assert skipped.value.reason == "too_long"


@pytest.mark.parametrize("limit", range(3, 60))
def test_no_image_is_cut_in_two(limit: int) -> None:
    text = "One <image> dog and <image> another one here <image> at last."
    pictures = [picture(shade) for shade in (1, 2, 3)]
    full = interleaved(text, *pictures).branches[0]
    example = interleaved(text, *pictures, max_tokens=limit)
    (row,) = example.branches
    assert len(row) <= limit
    assert row.token_ids.tolist() == full.token_ids[: len(row)].tolist()
    assert (row.token_ids == -1).sum() == sum(image.num_tokens for image in example.images)
    assert row.token_ids[-1] != -1


def test_the_models_positions_bound_every_example() -> None:
    of = kit("nvila")
    assert of.encoder(max_tokens=10**9).max_tokens == of.config.decoder.max_positions
    assert of.encoder().max_tokens == of.config.decoder.max_positions


def fails() -> bytes:
    raise SkippedDocument("missing_file", "gone")


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (ask("What?", images=(b"not an image",)), "not_an_image"),
        (ask("What?", images=(png()[:60],)), "corrupt_image"),
        (ask("What?", images=(b"",)), "empty_file"),
        (ask("What?", images=(LazyImage(fails),)), "missing_file"),
        (ask("<image> and <image>"), "bad_prompt"),
        (Document("k", "interleaved", (picture(),), "<image> and <image> dog"), "bad_prompt"),
    ],
)
def test_what_cannot_be_used_is_skipped_with_its_reason(document: Document, reason: str) -> None:
    with pytest.raises(SkippedDocument) as skipped:
        kit("vila15").encoder().encode(document)
    assert skipped.value.reason == reason
