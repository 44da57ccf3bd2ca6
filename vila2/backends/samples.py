"""What int8 weights are rounded for: images of the synthetic world, and what the model itself says of them.

The world's dev split, on which engines are measured, is left alone.
"""

import gc
from collections.abc import Sequence

import torch

from vila2.backends.compute import ComputePlan
from vila2.backends.native import NativeCaptioner, size_engine
from vila2.errors import UsageError
from vila2.model.checkpoint import LoadedCheckpoint
from vila2.model.images import PreparedImage
from vila2.model.prompt import build_prompt
from vila2.model.sample import Sample
from vila2.types import Caption, CaptionRequest, SamplingParams
from vila2.world import World, WorldSettings, texts

SPLIT = "pretrain"
COUNT = 16
EXACT = ComputePlan(torch.float32, None, torch.float32, "float32")
_MOST_TOKENS = 6144  # of all samples: an image of a dozen tiles has thousands
_NEW_TOKENS = 64


def own_samples(checkpoint: LoadedCheckpoint, template: str, count: int = COUNT) -> tuple[Sample, ...]:
    """Up to `count` samples for a float32 `checkpoint` that is not packed; fewer where images are of many tokens."""
    world = World(WorldSettings(image_size=checkpoint.config.image_size))
    prompts = texts.CAPTION_PROMPTS["detailed"]
    asked: dict[str, list[PreparedImage]] = {}
    room = _MOST_TOKENS
    for index in range(count):
        image = checkpoint.image_processor.prepare(world.render(world.scene(SPLIT, index)))
        room -= image.num_tokens + _NEW_TOKENS
        if room < 0 and asked:
            break
        asked.setdefault(prompts[index % len(prompts)], []).append(image)
    samples = []
    for prompt, images in asked.items():
        captions = write_captions(checkpoint, EXACT, "cpu", template, prompt, images, _NEW_TOKENS)
        for image, caption in zip(images, captions, strict=True):
            tokens = build_prompt(template, prompt, [image], checkpoint.tokenizer, checkpoint.config)
            samples.append(Sample(image, tokens, caption.token_ids))
    return tuple(samples)


def write_captions(
    checkpoint: LoadedCheckpoint,
    plan: ComputePlan,
    device: str,
    template: str,
    prompt: str,
    images: Sequence[PreparedImage],
    max_new_tokens: int,
) -> list[Caption]:
    """Greedy captions, one an image, in order. UsageError if one cannot be written."""
    if device == "cuda":
        # What the run before held (float32 weights, a cache, graphs) counts as taken until it is given back.
        gc.collect()
        torch.cuda.empty_cache()
    batch = len(images) if device == "cuda" else None
    limits = size_engine(checkpoint, plan, device, batch, max_new_tokens)
    captioner = NativeCaptioner(checkpoint, plan, "", template, limits)
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    requests = (CaptionRequest(i, prompt, (image,), sampling) for i, image in enumerate(images))
    captions = {caption.id: caption for caption in captioner.caption(requests)}
    for caption in captions.values():
        if caption.error is not None:
            raise UsageError(f"a calibration image cannot be captioned: {caption.error.message}")
    return [captions[i] for i in range(len(images))]
