"""The tokens and the loss of each template, token by token, against texts that are written out here."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_tokenizers import CHATML
from tests.unit.train.kits import NAMES, Kit, kit, picture
from vila2.errors import UsageError
from vila2.model.conversation import ConversationEncoder, TrainingTokens
from vila2.model.images import PreparedImage
from vila2.model.prompt import build_prompt
from vila2.train.examples import Document, EncodedExample, Row

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
)
LLAMA_3_ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
TWO_TURNS = (("What is it?", "A red square."), ("Where is it?", "On a table."))


def image(of: Kit, count: int = 1, width: int = 20) -> PreparedImage:
    return of.processor.prepare(picture(width=width), count)


def encode(of: Kit, turns=TWO_TURNS, images=None, template: str | None = None) -> Row:
    images = [image(of)] if images is None else images
    return whole(ConversationEncoder(of.tokenizer, of.config, template).conversation(turns, images))


def whole(tokens: TrainingTokens) -> Row:
    ids = np.concatenate([tokens.header, np.array(tokens.token_ids, dtype=np.int64)])
    return Row(ids, np.array([False] * len(tokens.header) + tokens.in_loss))


def check(of: Kit, row: Row, pieces: list[tuple[str | int | list[int], bool]], bos: bool = False) -> None:
    """Compare with pieces: a text (tokenised by itself), a token, or tokens; and whether they are in the loss."""
    ids: list[int] = []
    loss: list[bool] = []
    for number, (piece, in_loss) in enumerate(pieces):
        if isinstance(piece, str):
            piece = of.ids(piece, specials=bos and number == 0)  # noqa: PLW2901 - its tokens
        found = [piece] if isinstance(piece, int) else piece
        ids += found
        loss += [in_loss] * len(found)
    assert row.token_ids.tolist() == ids
    assert row.in_loss.tolist() == loss


def after(of: Kit, context: str, text: str) -> list[int]:
    """The tokens of `text` where it follows `context`."""
    before, both = of.ids(context), of.ids(context + text)
    assert both[: len(before)] == before
    return both[len(before) :]


def test_vicuna_v1_with_an_image() -> None:
    of = kit("vila15")
    turns = (("Is it a dog?", "no"), ("Is it red?", "yes"))
    row = encode(of, turns)
    first, second = "\nIs it a dog? ASSISTANT:", "USER: Is it red? ASSISTANT:"
    check(
        of,
        row,
        [
            (f"{VICUNA} USER: ", False),
            ([-1] * 4, False),
            (first, False),
            (after(of, first, " no"), True),
            (2, True),
            (after(of, "</s>", second), False),
            (after(of, second, " yes"), True),
            (2, True),
        ],
        bos=True,
    )


def test_vicuna_v1_is_the_whole_text_tokenised_at_once() -> None:
    of = kit("vila15")
    turns = (("Is it a dog?", "no"), ("Is it red?", "yes"))
    row = encode(of, turns, images=[])
    text = f"{VICUNA} USER: Is it a dog? ASSISTANT: no</s>USER: Is it red? ASSISTANT: yes</s>"
    assert row.token_ids.tolist() == of.ids(text, specials=True)
    assert [of.tokenizer.decode(run) for run in runs(row)] == ["no", "yes"]


def test_llama_3_ends_its_turns_and_its_text_with_tokens_of_their_own() -> None:
    of = kit("llama_3")
    row = encode(of)
    end, last = (of.tokenizer.token_id(name) for name in ("<|eot_id|>", "<|end_of_text|>"))
    check(
        of,
        row,
        [
            (LLAMA_3, False),
            ([-1] * 4, False),
            (f"\nWhat is it?{LLAMA_3_ANSWER}", False),
            ("A red square.", True),
            (end, True),
            (f"<|start_header_id|>user<|end_header_id|>\n\nWhere is it?{LLAMA_3_ANSWER}", False),
            ("On a table.", True),
            (last, True),
        ],
    )


def test_hermes_2_sets_no_newline_between_turns() -> None:
    of = kit("hermes-2")
    end = of.tokenizer.token_id("<|im_end|>")
    asks = "<|im_end|><|im_start|>assistant\n"
    check(
        of,
        encode(of),
        [
            ("<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n", False),
            ([-1] * 4, False),
            (f"\nWhat is it?{asks}", False),
            ("A red square.", True),
            (end, True),
            (f"<|im_start|>user\nWhere is it?{asks}", False),
            ("On a table.", True),
            (end, True),
        ],
    )


def test_auto_is_the_tokenizers_own_chat_template() -> None:
    of = kit("nvila")
    end = of.tokenizer.token_id("<|im_end|>")
    asks = "<|im_end|>\n<|im_start|>assistant\n"
    check(
        of,
        encode(of),
        [
            ("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n", False),
            ([-1] * 4, False),
            ("\n", False),  # the newline that follows NVILA's features
            (f"What is it?{asks}", False),
            ("A red square.", True),
            (end, True),
            (f"\n<|im_start|>user\nWhere is it?{asks}", False),
            ("On a table.", True),
            (end, True),
        ],
    )


def test_auto_without_a_token_that_ends_an_answer_gets_the_end_of_sequence() -> None:
    of = kit("llava")
    row = encode(of, (("Is it a dog?", "no"), ("Is it red?", "yes")))
    text = "USER: <image>\nIs it a dog? ASSISTANT: no</s> USER: Is it red? ASSISTANT: yes</s>"
    ids = of.ids(text, specials=True)
    at = ids.index(of.tokenizer.image_token_id)
    assert row.token_ids.tolist() == ids[:at] + [-1] * 4 + ids[at + 1 :]
    ends = np.flatnonzero(row.token_ids == 2)
    assert row.in_loss[ends].all()
    assert [of.tokenizer.decode(run) for run in runs(row)] == ["no", "yes"]


@pytest.mark.parametrize("name", NAMES)
def test_plain_is_image_newline_caption_and_end(name: str) -> None:
    of = kit(name)
    tokens = ConversationEncoder(of.tokenizer, of.config).caption(" A red square. \n", [image(of)])
    row = whole(tokens)
    bos = [1] if name in ("vila15", "melting", "llava") else []
    ids = row.token_ids.tolist()
    assert ids[: len(bos) + 4] == bos + [-1] * 4
    newline = of.ids("\n")
    assert ids[len(bos) + 4 : len(bos) + 4 + len(newline)] == newline
    (written,) = runs(row)
    assert of.tokenizer.decode(written[:-1]).strip() == "A red square."
    assert written[-1] == of.tokenizer.inner.eos_token_id
    assert row.in_loss[-1]


def test_the_loss_of_plain_text_is_on_all_but_the_first_token() -> None:
    for name in ("vila15", "nvila"):
        of = kit(name)
        row = whole(ConversationEncoder(of.tokenizer, of.config).text("A red square."))
        expected = [*of.ids("A red square.", specials=True), of.tokenizer.inner.eos_token_id]
        assert row.token_ids.tolist() == expected
        assert row.in_loss.tolist() == [False] + [True] * (len(expected) - 1)


def runs(row: Row) -> list[list[int]]:
    """The stretches of tokens in the loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.in_loss.astype(int), [0]])))
    return [row.token_ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


words = st.text(alphabet="abc ABC.,?\n\"'{}[]019éß漢😀", min_size=1, max_size=30)
questions = st.one_of(
    words, words.map(lambda text: f"<image>\n{text}"), words.map(lambda text: f"{text} <image>")
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(question=questions, answer=words.filter(str.strip), width=st.sampled_from([20, 40]))
def test_a_first_turn_begins_with_the_prompt_of_inference(
    name: str, question: str, answer: str, width: int
) -> None:
    of = kit(name)
    images = [image(of, width=width)]
    row = encode(of, ((question, answer),), images)
    prompt = build_prompt(of.config.template, question, images, of.tokenizer, of.config).token_ids
    assert row.token_ids[: len(prompt)].tolist() == prompt
    assert not row.in_loss[: len(prompt)].any()
    assert row.in_loss[len(prompt) :].all()
    assert len(row) > len(prompt)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(turns=st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=4))
def test_the_loss_is_on_the_answers_and_nothing_else(name: str, turns: list[tuple[str, str]]) -> None:
    of = kit(name)
    found = runs(encode(of, turns))
    assert len(found) == len(turns)
    for run, (_, answer) in zip(found, turns, strict=True):
        assert of.tokenizer.is_special(run[-1])
        assert of.tokenizer.decode(run[:-1]).strip() == of.tokenizer.decode(of.ids(answer.strip())).strip()


def test_images_in_later_turns_stand_where_the_text_says() -> None:
    of = kit("vila15")
    images = [image(of, 2), image(of, 2)]
    tokens = ConversationEncoder(of.tokenizer, of.config).conversation(
        (("<image>\nIs it a dog?", "no"), ("and <image>\nhere?", "yes")), images
    )
    assert len(tokens.header) == 0
    row = whole(tokens)
    spans = np.flatnonzero(np.diff(np.concatenate([[0], (row.token_ids == -1).astype(int), [0]])))
    assert np.diff(spans)[::2].tolist() == [4, 4]
    between = row.token_ids[spans[1] : spans[2]].tolist()
    assert between[-len(after(of, "</s>", "USER: and ")) :] == after(of, "</s>", "USER: and ")
    assert [of.tokenizer.decode(run) for run in runs(row)] == ["no", "yes"]


def test_an_image_mark_inside_an_answer_is_no_image() -> None:
    for name in ("vila15", "nvila"):
        of = kit(name)
        row = encode(of, (("What does it say?", "It says <image> here."),))
        assert (row.token_ids == -1).sum() == 4
        assert "<IMAGE>" in of.tokenizer.decode(runs(row)[0])


def test_another_number_of_marks_than_images_is_an_error() -> None:
    of = kit("vila15")
    with pytest.raises(ValueError, match="names 2 images"):
        encode(of, (("<image> <image>", "no"),))
    with pytest.raises(ValueError, match="names 1 images"):
        encode(of, (("<image>", "no"),), images=[])


def test_a_template_that_writes_its_bos_and_its_end() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]"
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    of = kit("llava", template)
    row = encode(of, (("Is it a dog?", "no"), ("Is it red?", "yes")))
    ids = of.ids(
        "[user]<image>\nIs it a dog?[assistant]no</s>[user]Is it red?[assistant]yes</s>", specials=True
    )
    at = ids.index(of.tokenizer.image_token_id)
    assert row.token_ids.tolist() == ids[:at] + [-1] * 4 + ids[at + 1 :]
    assert row.token_ids.tolist().count(1) == 1
    assert [run[-1] for run in runs(row)] == [2, 2]


def test_a_template_that_trims_is_followed_in_the_prompt() -> None:
    of = kit("nvila", CHATML.replace("message['content']", "message['content'] | trim"))
    for question in ("  spaces around ", "plain", "<b>angles</b>"):
        row = encode(of, ((question, "yes"),), images=[])
        prompt = build_prompt("auto", question, [], of.tokenizer, of.config).token_ids
        assert row.token_ids[: len(prompt)].tolist() == prompt
        assert row.in_loss[len(prompt) :].all()


def test_a_template_that_loses_the_answer_is_an_error() -> None:
    of = kit(
        "nvila",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
    )
    with pytest.raises(ValueError, match="loses an answer"):
        encode(of, images=[])


def test_a_tokenizer_without_an_end_of_sequence_is_refused() -> None:
    of = kit("vila15")
    bare = kit.__wrapped__("vila15").tokenizer
    bare.inner.eos_token = None
    bare.eos_ids = frozenset()
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        ConversationEncoder(bare, of.config)


def test_a_token_without_an_embedding_is_an_error() -> None:
    of = kit("nvila")
    small = replace(of.config, decoder=replace(of.config.decoder, vocab_size=300))
    with pytest.raises(ValueError, match="for which the model has no embedding"):
        ConversationEncoder(of.tokenizer, small).text("The photograph shows two dogs running along the beach")


def joined(example: EncodedExample, branch: int) -> Row:
    parts = (example.prefix, example.branches[branch])
    return Row(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("token_ids", "in_loss")))


@pytest.mark.parametrize("name", NAMES)
def test_several_conversations_share_one_header(name: str) -> None:
    of = kit(name)
    document = Document(
        "k", "conversation", (picture(),), conversations=(TWO_TURNS, (("Describe.", "Two dogs."),))
    )
    example = of.encoder().encode(document)
    assert len(example.images) == 1
    assert example.prefix.token_ids[-1] == -1
    for number, turns in enumerate(document.conversations):
        alone = encode(of, turns)
        together = joined(example, number)
        assert together.token_ids.tolist() == alone.token_ids.tolist()
        assert together.in_loss.tolist() == alone.in_loss.tolist()
        assert not example.branches[number].in_loss[0]
