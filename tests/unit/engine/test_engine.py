"""The whole engine on tiny random models: the same tokens as transformers, whatever the batch.

Weights are random, so a greedy continuation is a strict test: any error in positions, masks, cache or splicing
changes it at once.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import write_llava, write_nvila, write_vila15
from tests.unit.engine.engines import photo, with_limits
from vila2.backends.native import NativeCaptioner
from vila2.engine.sequence import EngineRequest
from vila2.types import Caption, CaptionRequest, FinishReason, RepetitionRule, SamplingParams

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llava") / "tiny"
    write_llava(path)
    return path


def requests(
    captioner: NativeCaptioner, count: int, prompts: int = 1, sampling: SamplingParams = GREEDY
) -> list[CaptionRequest]:
    made = []
    for i in range(count):
        image = captioner.prepare(photo(i))
        for j in range(prompts):
            text = ["What is this?", "Describe the picture in a few words.", "Where are things?"][j]
            made.append(
                CaptionRequest(
                    i * prompts + j, text, (image,), sampling, image_key=i, num_siblings=prompts, rng_key=i
                )
            )
    return made


def tokens(captions: list[Caption]) -> dict[int, tuple[int, ...]]:
    assert all(caption.error is None for caption in captions)
    return {caption.id: caption.token_ids for caption in captions}


@pytest.mark.parametrize("write", [write_llava, write_vila15, write_nvila])
def test_captions_do_not_depend_on_batch_chunks_sharing_or_preemption(tmp_path, write):
    write(tmp_path / "tiny")
    reference = with_limits(tmp_path / "tiny", max_num_seqs=1, max_batch_tokens=4096, vision_batch=1)
    expected: dict[int, tuple[int, ...]] = {}
    for request in requests(reference, 5, prompts=3):
        alone = CaptionRequest(request.id, request.prompt, request.images, request.sampling)
        expected |= tokens(list(reference.caption([alone])))
    assert len(set(expected.values())) > 10  # the captions tell the prompts and the images apart

    longest = max(c for c in [24 + len(build(reference, r)) for r in requests(reference, 5, prompts=3)])
    for limits in (
        {"max_num_seqs": 7, "max_batch_tokens": 64, "vision_batch": 3},
        {"max_num_seqs": 15, "max_batch_tokens": 16, "block_size": 4},
        {
            "max_num_seqs": 15,
            "max_batch_tokens": 512,
            "block_size": 8,
            "num_kv_tokens": 8 * (longest // 8 + 3),
        },
    ):
        captioner = with_limits(tmp_path / "tiny", **limits)
        got = tokens(list(captioner.caption(requests(captioner, 5, prompts=3))))
        assert got == expected, limits
        stats = captioner.stats()
        assert stats["images_encoded"] == 5
        assert stats["images_shared"] == 10
        if "num_kv_tokens" in limits:
            assert stats["preemptions"] > 0
        else:
            assert stats["computed_tokens"] < stats["prompt_tokens"] + stats["new_tokens"]


def build(captioner: NativeCaptioner, request: CaptionRequest) -> list[int]:
    from vila2.model.prompt import build_prompt

    checkpoint = captioner.checkpoint
    return build_prompt(
        captioner.template, request.prompt, list(request.images), checkpoint.tokenizer, checkpoint.config
    ).token_ids


def test_sampled_captions_depend_on_the_key_alone(llava):
    sampling = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=16, ignore_eos=True)
    wide = with_limits(llava, max_num_seqs=8, max_batch_tokens=64)
    narrow = with_limits(llava, max_num_seqs=2, max_batch_tokens=9)
    first = tokens(list(wide.caption(requests(wide, 6, sampling=sampling))))
    assert first == tokens(list(narrow.caption(requests(narrow, 6, sampling=sampling))))


def test_requests_may_come_late(llava):
    captioner = with_limits(llava, max_num_seqs=4, max_batch_tokens=64)
    made = requests(captioner, 4)
    late = [None, made[0], None, None, made[1], made[2], None, made[3]]
    assert tokens(list(captioner.caption(late))) == tokens(list(captioner.caption(made)))


def test_stops_minimum_length_and_loops(llava):
    captioner = with_limits(llava, max_num_seqs=4, max_batch_tokens=64)
    [free] = captioner.caption(requests(captioner, 1))
    assert free.finish_reason is FinishReason.LENGTH
    assert len(free.token_ids) == 24
    middle = captioner.checkpoint.tokenizer.decode(free.token_ids[10:12]).strip()
    assert middle
    stopping = SamplingParams(max_new_tokens=24, ignore_eos=True, stop=(middle,))
    [stopped] = captioner.caption(requests(captioner, 1, sampling=stopping))
    assert stopped.finish_reason is FinishReason.STOP
    assert len(stopped.token_ids) <= 12
    assert middle not in stopped.text

    # A rule that any output breaks at once cuts at its first repeat.
    loose = RepetitionRule(max_period=24, min_repeats=1, min_tokens=1)
    [cut] = captioner.caption(
        requests(captioner, 1, sampling=SamplingParams(max_new_tokens=24, repetition=loose))
    )
    assert cut.finish_reason is FinishReason.REPETITION
    assert captioner.stats()["loops_cut"] == 1


def test_a_prompt_without_room_is_a_typed_error_and_costs_only_itself(llava):
    captioner = with_limits(llava, max_num_seqs=4, max_batch_tokens=64, num_kv_tokens=256)
    good = requests(captioner, 2)
    too_long = CaptionRequest(9, "word " * 400, good[0].images, GREEDY)
    captions = {caption.id: caption for caption in captioner.caption([good[0], too_long, good[1]])}
    assert captions[9].error is not None
    assert captions[9].error.kind.value == "prompt_too_long"
    assert len(captions[0].token_ids) == len(captions[1].token_ids) == 24


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_greedy_continuations_are_those_of_transformers(llava, num_images):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    captioner = with_limits(llava, max_num_seqs=4, max_batch_tokens=32)
    images = [captioner.checkpoint.image_processor.prepare(photo(i), num_images) for i in range(num_images)]
    text = " and ".join(["<image>"] * num_images) + " what is this?"
    ids = build(captioner, CaptionRequest(0, text, tuple(images)))
    image_token = theirs.config.image_token_index if hasattr(theirs.config, "image_token_index") else None
    image_token = image_token if image_token is not None else theirs.config.image_token_id
    input_ids = torch.tensor([[image_token if token < 0 else token for token in ids]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if images:
        config = captioner.checkpoint.config
        mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
        tiles = torch.from_numpy(np.concatenate([image.tiles for image in images])).float()
        inputs["pixel_values"] = ((tiles / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    eos = sorted(captioner.engine.eos_ids)
    with torch.inference_mode():
        out = theirs.generate(
            **inputs,
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0],
        )
    sampling = SamplingParams(max_new_tokens=64, ignore_eos=True)
    [ours] = captioner.caption([CaptionRequest(0, text, tuple(images), sampling)])
    assert list(ours.token_ids) == out[0, input_ids.shape[1] :].tolist()


def test_the_engine_refuses_what_it_cannot_hold(llava):
    engine = with_limits(llava, max_num_seqs=1, max_batch_tokens=8, num_kv_tokens=64).engine
    with pytest.raises(ValueError, match="the prompt has 64 tokens"):
        engine.add(EngineRequest(0, tuple(range(64))))
