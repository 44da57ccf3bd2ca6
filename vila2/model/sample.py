"""One image with what was asked of it and what was answered: what a model in few bits is made and measured on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vila2.model.images import PreparedImage
from vila2.model.prompt import PromptTokens
from vila2.model.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Sample:
    """`answer` are the token ids that the model itself wrote."""

    image: PreparedImage
    prompt: PromptTokens
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt.token_ids) + len(self.answer)


def embed_sample(model: VisionLanguageModel, sample: Sample) -> Tensor:
    """The decoder's input (len(sample), hidden): the prompt with the image's tokens in their places, and the answer."""
    visual = model.encode_images([sample.image])[0]
    tokens = torch.tensor([*sample.prompt.token_ids, *sample.answer], device=visual.device)
    hidden = model.decoder.embed(tokens.clamp_min(0))
    rows = sample.image.num_tokens // sample.image.num_placeholders
    for start, length, _, chunk in sample.prompt.image_spans:
        hidden[start : start + length] = visual[chunk * rows : chunk * rows + length]
    return hidden
