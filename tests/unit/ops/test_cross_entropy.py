"""Linear and cross entropy in one, against torch on all logits."""

import pytest
import torch

from vila2.ops import cross_entropy as module
from vila2.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

torch.set_num_threads(1)


def problem(rows, width, vocab, dtype=torch.float32, ignored=0.3):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden, weight, labels


@pytest.fixture(params=["fast", "torch"])
def path(request, monkeypatch):
    """The softmax in `_C`, and in torch."""
    if request.param == "torch":
        monkeypatch.setattr(module, "is_native_training", lambda *tensors: False)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("chunk", [1, 7, 64, None])
@pytest.mark.parametrize("shape", [(0, 8, 11), (1, 8, 3), (50, 16, 33), (130, 24, 1001)], ids=str)
def test_loss_and_gradients_equal_the_reference(shape, chunk):
    hidden, weight, labels = problem(*shape)
    expected = linear_cross_entropy_reference(hidden, weight, labels)
    actual = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    ours = torch.autograd.grad(actual * 0.25, (hidden, weight))
    theirs = torch.autograd.grad(expected * 0.25, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_gradients_are_true():
    hidden, weight, labels = problem(9, 5, 7)
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    for function in (linear_cross_entropy_reference, lambda *x: linear_cross_entropy(*x, chunk=4)):
        assert torch.autograd.gradcheck(lambda h, w, f=function: f(h, w, labels), (hidden, weight))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_wanted_gradients(wanted):
    hidden, weight, labels = problem(20, 8, 30)
    hidden, weight = hidden.detach().requires_grad_(wanted[0]), weight.detach().requires_grad_(wanted[1])
    loss = linear_cross_entropy(hidden, weight, labels, chunk=6)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == wanted


@pytest.mark.usefixtures("path")
def test_every_row_ignored_costs_nothing():
    hidden, weight, labels = problem(10, 8, 30, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.usefixtures("path")
def test_huge_logits():
    hidden, weight, labels = problem(12, 8, 30, ignored=0)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(
        loss, linear_cross_entropy_reference(hidden, weight, labels), rtol=1e-5, atol=0
    )
    loss.backward()
    assert hidden.grad.isfinite().all()


def test_bfloat16_sums_in_float32():
    hidden, weight, labels = problem(40, 32, 300, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=9)
    expected = linear_cross_entropy_reference(hidden.float(), weight.float(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_by_parts_as_on_cuda(dtype, monkeypatch):
    hidden, weight, labels = problem(40, 24, 101, dtype=dtype)
    expected = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, labels, chunk=9) * 0.5, (hidden, weight)
    )
    monkeypatch.setattr(module, "_part_rows", lambda weight: 30)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=9) * 0.5
    for _ in range(2):  # a second backward pass finds the gradients as they were
        for ours, whole in zip(
            torch.autograd.grad(loss, (hidden, weight), retain_graph=True), expected, strict=True
        ):
            torch.testing.assert_close(ours, whole)


def peak_bytes(call):
    """The most bytes of tensors that the call has at one time."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_peak_of_memory_is_a_quarter_of_eager_torch(monkeypatch):
    # A sixteenth of a batch and of a Llama 3 head each way, and the parts that CUDA would have; chunks are smaller,
    # because torch's softmax, which stands for the kernel's, works in float32 copies.
    hidden, weight, labels = problem(512, 256, 8016, dtype=torch.bfloat16, ignored=0)
    monkeypatch.setattr(module, "_part_rows", lambda weight: 1024)
    monkeypatch.setattr(module, "is_native_training", lambda *tensors: False)
    ours = peak_bytes(lambda: linear_cross_entropy(hidden, weight, labels, chunk=16).backward())
    hidden.grad = weight.grad = None
    eager = peak_bytes(lambda: linear_cross_entropy_reference(hidden, weight, labels).backward())
    assert eager > 3 * 4 * 512 * 8016
    assert ours < eager / 4.2


def test_a_graph_may_be_walked_twice():
    hidden, weight, labels = problem(10, 8, 30)
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss * 3, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0] * 3, first)


def test_bad_arguments_are_refused():
    hidden, weight, labels = problem(10, 8, 30)
    with pytest.raises(ValueError, match="below 30"):
        linear_cross_entropy(hidden, weight, labels.fill_(30))
    with pytest.raises(ValueError, match="below 30"):
        linear_cross_entropy(hidden, weight, labels.fill_(-1))
    with pytest.raises(ValueError, match="as many labels"):
        linear_cross_entropy(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match=r"hidden \(n, h\)"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(hidden, weight, labels.fill_(0), chunk=0)
