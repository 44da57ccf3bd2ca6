"""The loss of a packed batch, against every conversation run by itself with all of its logits."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from vila2.model.decoder import DecoderConfig, DenseAttend
from vila2.model.images import PreparedImage
from vila2.model.projector import ProjectorConfig
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.train.loss import batch_hidden, batch_loss
from vila2.train.packing import PackedBatch

torch.set_num_threads(1)

VOCAB, VISUAL = 50, 4


def small_model(kind="siglip", tied=True, kv_heads=2):
    torch.manual_seed(1)
    vision = VisionConfig(
        kind=kind,
        image_size=16,
        patch_size=4,
        width=16,
        inner_width=24,
        num_layers=2,
        num_heads=2,
        activation="gelu_pytorch_tanh" if kind == "siglip" else "quick_gelu",
        norm_eps=1e-6,
        select_layer=-1,
        select_feature="cls_patch" if kind == "siglip" else "patch",
    )
    decoder = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=6,
        max_positions=64,
        qkv_bias=True,
        tie_embeddings=tied,
    )
    projector = ProjectorConfig("mlp_downsample", 16, 24)
    model = VisionLanguageModel.from_config(ModelConfig(vision, projector, decoder, "resize", 16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def image(seed):
    tiles = np.random.default_rng(seed).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    return PreparedImage(tiles, "resize", None, VISUAL, 1, 16, 16)


def example(seed, branches=(5, 9, 2)):
    """A header of two tokens, an image, and independent branches of which the second half is in the loss."""
    rng = np.random.default_rng(seed)
    prefix = np.concatenate((rng.integers(0, VOCAB, 2), np.full(VISUAL, -1), rng.integers(0, VOCAB, 1)))
    return SimpleNamespace(
        image=image(seed), prefix=prefix, branches=[rng.integers(0, VOCAB, size) for size in branches]
    )


def packed(examples):
    ids, labels, positions, segments, size = [], [], [], [], 0
    for one in examples:
        base, seen = size, len(one.prefix)
        segments.append((base, base + seen, base, base))
        ids.append(one.prefix)
        labels.append(np.full(seen, -100))
        positions.append(np.arange(seen))
        size += seen
        for branch in one.branches:
            segments.append((size, size + len(branch), base, base + seen))
            ids.append(branch)
            label = np.full(len(branch), -100)
            half = len(branch) // 2
            label[half:-1] = branch[half + 1 :]
            labels.append(label)
            positions.append(np.arange(seen, seen + len(branch)))
            size += len(branch)
    token_ids, labels = np.concatenate(ids), np.concatenate(labels)
    return PackedBatch(
        token_ids=token_ids,
        labels=labels,
        positions=np.concatenate(positions),
        segments=np.array(segments, dtype=np.int64),
        images=[one.image for one in examples],
        visual_rows=np.flatnonzero(token_ids == -1),
        keys=["x"] * len(examples),
        num_labels=int((labels != -100).sum()),
    )


def one_by_one(model, examples):
    """Each branch with its prefix as a sequence of its own, all logits, torch's cross entropy."""
    total = torch.zeros(())
    for one in examples:
        visual = model.encode_images([one.image])[0]
        for branch in one.branches:
            ids = torch.from_numpy(np.concatenate((one.prefix, branch)))
            embedded = [
                visual[int((ids[:i] == -1).sum())] if ids[i] == -1 else model.decoder.embed(ids[i : i + 1])[0]
                for i in range(len(ids))
            ]
            positions = torch.arange(len(ids))
            attend = DenseAttend(positions, [len(ids)], model.decoder.cos, model.decoder.sin)
            logits = model.decoder.logits(model.decoder(torch.stack(embedded), attend))
            first = len(one.prefix) + len(branch) // 2
            total = total + functional.cross_entropy(logits[first:-1], ids[first + 1 :], reduction="sum")
    return total


def gradients(model, loss):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize(("kind", "tied", "kv_heads"), [("siglip", True, 2), ("clip", False, 4)])
def test_loss_and_gradients_equal_single_sequences(kind, tied, kv_heads):
    model = small_model(kind, tied, kv_heads)
    examples = [example(0), example(1, (6,)), example(2, (3, 8))]
    loss, count = batch_loss(model, packed(examples), "cpu")
    expected = one_by_one(model, examples)
    assert count == sum(len(b) - 1 - len(b) // 2 for one in examples for b in one.branches)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name, gradient in theirs.items():
        assert gradient is not None
        torch.testing.assert_close(
            ours[name], gradient, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_that_are_asked_for_are_those_of_the_whole():
    model, batch = small_model(), packed([example(7), example(8)])
    whole = batch_hidden(model, batch, "cpu")
    for rows in ([], [3], list(range(batch.num_rows)), [9, 2, 5]):
        chosen = torch.tensor(rows, dtype=torch.int64)
        torch.testing.assert_close(batch_hidden(model, batch, "cpu", chosen), whole[chosen])


@pytest.mark.parametrize("part", ["vision", "projector", "decoder"])
def test_only_the_trained_part_gets_gradients(part):
    model = small_model().requires_grad_(False)
    getattr(model, part).requires_grad_(True)
    loss, _ = batch_loss(model, packed([example(3)]), "cpu")
    loss.backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith(part)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name


def test_without_gradients_the_loss_is_the_same():
    model, batch = small_model(), packed([example(4), example(5)])
    loss, _ = batch_loss(model, batch, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(batch_loss(model, batch, "cpu")[0], loss, rtol=1e-5, atol=1e-4)


def test_text_alone_and_no_rows_at_all():
    model = small_model()
    one = SimpleNamespace(prefix=np.arange(5), branches=[np.arange(6)])
    text = packed([SimpleNamespace(image=None, **vars(one))])
    text.images.clear()
    loss, count = batch_loss(model, text, "cpu")
    loss.backward()
    assert count == 2
    assert loss > 0
    empty = PackedBatch(
        *(np.empty(0, dtype=np.int64) for _ in range(3)),
        np.empty((0, 4), dtype=np.int64),
        [],
        np.empty(0, dtype=np.int64),
        [],
        0,
    )
    loss, count = batch_loss(model, empty, "cpu")
    loss.backward()
    assert (float(loss.detach()), count) == (0.0, 0)


def test_the_host_reads_no_value_between_a_batch_and_its_gradients():
    """On the meta device, where there are none: on CUDA the host would wait for each."""
    model = small_model().to("meta")
    loss, count = batch_loss(model, packed([example(0), example(1, (6,))]), "meta")
    loss.backward()
    assert count
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


def test_a_label_beyond_the_vocabulary_is_refused():
    model, batch = small_model(), packed([example(6)])
    batch.labels[-1] = model.config.decoder.vocab_size
    with pytest.raises(ValueError, match="labels must be below"):
        batch_loss(model, replace(batch, num_labels=batch.num_labels + 1), "cpu")


def test_a_position_beyond_the_tables_is_refused():
    batch = packed([example(6)])
    batch.positions[-1] = 64
    with pytest.raises(ValueError, match="a position of 64: the decoder has 64"):
        batch_loss(small_model(), batch, "cpu")
