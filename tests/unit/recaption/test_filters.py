import pytest

from vila2.recaption.filters import error_of, judge, trim_to_sentence
from vila2.types import Caption, ErrorKind, FinishReason, SampleError, Status


def caption(text: str, reason: FinishReason = FinishReason.STOP, error: SampleError | None = None) -> Caption:
    return Caption(0, text, (1, 2), reason, 3, error)


def test_a_good_caption_is_kept_and_stripped() -> None:
    verdict = judge(caption("  A dog.\n"), attempts_left=2)
    assert (verdict.status, verdict.text, verdict.retry, verdict.trimmed) == (
        Status.OK,
        "A dog.",
        False,
        False,
    )


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_caption_is_asked_again_and_then_an_error(text: str) -> None:
    assert judge(caption(text), attempts_left=1).retry
    last = judge(caption(text), attempts_left=0)
    assert (last.status, last.retry) == (Status.ERROR, False)
    assert error_of(caption(text)).kind is ErrorKind.EMPTY_CAPTION


def test_a_loop_is_asked_again_and_then_kept_with_its_mark() -> None:
    loop = caption("A red, a red, a red", FinishReason.REPETITION)
    assert judge(loop, attempts_left=1).retry
    last = judge(loop, attempts_left=0)
    assert (last.status, last.text, last.retry) == (Status.REPETITIVE, "A red, a red, a red", False)


def test_a_failed_caption_is_an_error_with_the_captioners_reason() -> None:
    failed = caption("", FinishReason.ERROR, SampleError(ErrorKind.PROMPT_TOO_LONG, "9 tokens"))
    verdict = judge(failed, attempts_left=2)
    assert (verdict.status, verdict.retry) == (Status.ERROR, False)
    assert error_of(failed).kind is ErrorKind.PROMPT_TOO_LONG


def test_a_cut_caption_is_trimmed_marked_or_left_as_asked() -> None:
    cut = caption("A dog runs on the beach. A cat", FinishReason.LENGTH)
    trimmed = judge(cut, attempts_left=2)
    assert (trimmed.status, trimmed.text, trimmed.trimmed) == (Status.OK, "A dog runs on the beach.", True)
    marked = judge(cut, attempts_left=2, truncation="mark")
    assert (marked.status, marked.text) == (Status.TRUNCATED, "A dog runs on the beach. A cat")
    whole = judge(cut, attempts_left=2, ignore_eos=True)
    assert (whole.status, whole.text) == (Status.OK, "A dog runs on the beach. A cat")


def test_a_cut_caption_that_happens_to_end_a_sentence_is_whole() -> None:
    verdict = judge(caption("A dog. A cat.", FinishReason.LENGTH), attempts_left=0)
    assert (verdict.status, verdict.text, verdict.trimmed) == (Status.OK, "A dog. A cat.", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two three. Four", "One two three."),
        ("Short. And then a very long sentence that never ends", None),
        ("no end at all", None),
        ("It says \u201cstop.\u201d Then", "It says \u201cstop.\u201d"),
        ("Is it red? Yes it", "Is it red?"),
        ("The price is 3.50 euros today", None),
        ("A portrait of Dr. Smith in the", None),
        ("The two cups hold about 3.", None),  # cut inside a decimal
        ("They stand in the year 1999. Then", "They stand in the year 1999."),
        ("Things seen here: a dog.\n2. A", "Things seen here: a dog."),
        ("\u4e00\u53ea\u72d7\u5728\u8dd1\u3002\u4e00\u53ea", "\u4e00\u53ea\u72d7\u5728\u8dd1\u3002"),
        ("", None),
    ],
)
def test_trimming_ends_at_the_last_sentence_end(text: str, expected: str | None) -> None:
    assert trim_to_sentence(text) == expected
