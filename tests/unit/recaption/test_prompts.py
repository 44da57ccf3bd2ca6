from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila2.config import RecaptionSettings, make_settings
from vila2.errors import UsageError
from vila2.recaption.prompts import (
    MissingFieldError,
    choose_prompts,
    load_prompts,
    make_prompts,
    parse_text,
    sample_values,
)
from vila2.recaption.stable import stable_hash
from vila2.types import Sample


def settings(**values: object) -> RecaptionSettings:
    return make_settings(RecaptionSettings, {"source": "s", "model": "m", "out": "o", **values})


def sample(index: int = 0, **fields: str) -> Sample:
    return Sample("shard", index, f"k{index}", b"", "a cat", fields)


def test_the_packaged_set_holds_what_the_readme_names() -> None:
    known = load_prompts()
    assert set(known) == {"detailed", "brief", "spatial", "grounding", "ocr", "spatial_questions"}
    assert len(known["detailed"].texts) == 3


def test_wordings_are_drawn_per_sample_from_the_seed_alone() -> None:
    first, again, other = (choose_prompts(settings(seed=seed)) for seed in (1, 1, 2))
    draws = [first.render("detailed", sample(i)) for i in range(60)]
    assert draws == [again.render("detailed", sample(i)) for i in range(60)]
    assert draws != [other.render("detailed", sample(i)) for i in range(60)]
    counts = [draws.count(text) for text in set(draws)]
    assert len(counts) == 3
    assert min(counts) > 8


def test_the_hash_is_pinned_because_resumed_runs_hang_on_it() -> None:
    assert stable_hash(0, "sample", "a.tar", 3, "brief", 0) == 4437123839353415031
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
    assert stable_hash(1) != stable_hash("1")


def test_fields_are_replaced_and_values_are_never_scanned_again() -> None:
    text = parse_text("{{{original}}} of {url}", "here")
    assert text.fill({"original": "{url} {{x}}", "url": "u"}) == "{{url} {{x}}} of u"


@given(st.text(), st.text())
def test_any_value_is_inserted_as_it_stands_but_an_image_mark(before: str, value: str) -> None:
    literal = before.replace("{", "{{").replace("}", "}}")
    filled = parse_text(literal + "{original}", "here").fill({"original": value})
    assert filled.startswith(before)
    assert "<image>" not in filled[len(before) :].lower() or "<IMAGE>" in filled


def test_an_image_mark_in_the_data_cannot_ask_for_an_image() -> None:
    assert parse_text("{original}", "here").fill({"original": "a <image> b <Image>"}) == "a <IMAGE> b <IMAGE>"


@pytest.mark.parametrize(
    "text", ["{original.__class__}", "{0}", "{}", "{original!r}", "a } b", "{original:>9}", "{"]
)
def test_nothing_but_plain_names_is_a_field(text: str) -> None:
    with pytest.raises(UsageError, match="fields are written"):
        parse_text(text, "prompt 'p'")


def test_a_missing_field_names_itself_and_what_there_is() -> None:
    prompts = make_prompts({"p": ["About {alt}"]}, 0)
    assert prompts.fields == {"alt"}
    with pytest.raises(MissingFieldError, match=r"\{alt\}.*index, key, original, shard, url"):
        prompts.render("p", sample(url="u"))
    assert prompts.render("p", sample(alt="x")) == "About x"


def test_the_samples_own_names_win_over_columns() -> None:
    assert sample_values(sample(key="evil", alt="x"))["key"] == "k0"


def test_a_template_goes_round_every_wording_but_not_into_the_question() -> None:
    prompts = choose_prompts(settings(prompt=["brief"], prompt_template="Alt: {original}\n{prompt}"))
    question = prompts.question("brief", sample())
    assert prompts.render("brief", sample()) == f"Alt: a cat\n{question}"
    assert "Alt" not in question
    with pytest.raises(UsageError, match=r"must hold \{prompt\}"):
        choose_prompts(settings(prompt_template="no place"))


def test_an_unknown_prompt_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'detialed' \(did you mean 'detailed'"):
        choose_prompts(settings(prompt=["detialed"]))


def test_a_users_file_adds_and_replaces(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("streets: {texts: ['Name the street.']}\nbrief: {texts: ['One word.']}\n")
    prompts = choose_prompts(settings(prompt=["brief", "streets", "ocr"], prompt_file=str(mine)))
    assert prompts.names == ("brief", "streets", "ocr")
    assert prompts.render("brief", sample()) == "One word."


@pytest.mark.parametrize(
    "body", ["a = 1", "[a]\ntexts = []", "[a]\ntexts = [1]", "[a]\ntext = ['x']", '["a b"]\ntexts=["x"]']
)
def test_a_users_file_of_the_wrong_form_is_refused_in_one_line(tmp_path: Path, body: str) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(body)
    with pytest.raises(UsageError) as caught:
        load_prompts(mine)
    assert str(mine) in str(caught.value)
    assert "\n" not in str(caught.value)
