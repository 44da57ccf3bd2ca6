"""What a model says along an answer, computed in one pass over a cache like the engine's."""

import pytest
import torch

from tests.unit.train.test_loss import VISUAL, image, small_model
from vila2.backends import quality
from vila2.engine.runner import PagedAttend
from vila2.model.decoder import DenseAttend
from vila2.model.prompt import PromptTokens
from vila2.model.sample import Sample, embed_sample


@pytest.mark.parametrize("length", [1, 8, 30])
@torch.inference_mode()
def test_an_answer_is_followed_through_blocks_of_one_size(length, monkeypatch):
    made = []

    def attend(**given):
        made.append(PagedAttend(**given))
        return made[-1]

    monkeypatch.setattr(quality, "PagedAttend", attend)
    model = small_model()
    prompt = PromptTokens([3, 4, *[-1] * VISUAL, 5, 6], [(2, VISUAL, 0, 0)])
    sample = Sample(image(0), prompt, tuple(range(7, 7 + length)))
    hidden = quality.follow(model, sample, torch.float32)
    assert hidden.shape == (length + 1, 24)
    assert made[0].cache.shape[-2] == 16  # kernels are compiled for this size, not for each sample's length
    dense = DenseAttend(torch.arange(len(sample)), [len(sample)], model.decoder.cos, model.decoder.sin)
    whole = model.decoder(embed_sample(model, sample), dense)
    torch.testing.assert_close(hidden, whole[-length - 1 :], rtol=1e-4, atol=1e-4)
