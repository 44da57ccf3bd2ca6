"""Counted operations against torch's own counter, and a ceiling that can be measured."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.train.test_loss import example, packed, small_model
from vila2.train.flops import caption_flops, measured_ceiling, product_ceiling, step_flops, visible_pairs
from vila2.train.loss import batch_loss

torch.set_num_threads(1)


def counted(model, batch, trained):
    """The linears, by torch."""
    model.requires_grad_(False)
    for part in trained:
        getattr(model, part).requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        loss, _ = batch_loss(model, batch, "cpu")
        if trained:
            loss.backward()
    counts = counter.get_flop_counts()["Global"]
    total = sum(count for operation, count in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))
    # Of the head, torch's counter misses the weights' gradient, which is added up in place.
    head = 2 * batch.num_labels * model.config.decoder.hidden_size * model.config.decoder.vocab_size
    return total + head * ("decoder" in trained)


@pytest.mark.parametrize(
    "trained", [("vision", "projector", "decoder"), ("projector",), ("projector", "decoder"), ("decoder",)]
)
def test_products_equal_those_that_torch_counts(trained):
    model, batch = small_model(tied=False), packed([example(0), example(1)])
    config = model.config
    ours = step_flops(config, batch, trained)
    pairs = 4.0 * visible_pairs(batch.segments) * config.decoder.q_size * config.decoder.num_layers * 3
    tower = 4.0 * 16 * 16 * config.vision.width * config.vision.num_layers_run * 2
    attention = pairs + tower * (3 if "vision" in trained else 1)
    assert ours - attention == counted(model, batch, trained)
    assert step_flops(config, [batch, batch], trained) == 2 * ours


def test_evaluation_is_the_forward_alone():
    model, batch = small_model(), packed([example(0)])
    assert step_flops(model.config, batch, ("vision", "projector", "decoder")) > 2 * step_flops(
        model.config, batch, ()
    )


def test_a_caption_is_a_step_without_learning_whose_labels_are_its_tokens():
    """But that every row of a caption sees all before it."""
    model, batch = small_model(), packed([example(0)])
    (image,) = batch.images
    rows = len(batch.token_ids)
    caption = caption_flops(
        model.config,
        tiles=len(image.tiles),
        visual=image.num_tokens,
        prompt=rows + 1 - batch.num_labels,
        new=batch.num_labels,
    )
    a_pair = 4.0 * model.config.decoder.q_size * model.config.decoder.num_layers
    unseen = rows * (rows + 1) // 2 - visible_pairs(batch.segments)
    assert caption - unseen * a_pair == step_flops(model.config, batch, ())


def test_a_ceiling_is_that_of_the_fastest_product_that_serves():
    assert product_ceiling(torch.int8, threads=1) > 0


def test_visible_pairs():
    segments = np.array([(0, 3, 0, 0), (3, 5, 0, 3)])
    assert visible_pairs(segments) == 6 + 3 + 6


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="unknown parts"):
        step_flops(small_model().config, packed([example(0)]), ("tower",))


def test_the_ceiling_is_a_rate_and_leaves_the_threads_alone():
    before = torch.get_num_threads()
    assert 1e8 < measured_ceiling(torch.float32, 1, seconds=0.05) < 1e14
    assert torch.get_num_threads() == before
