"""The softmax error in Triton: loss and gradient against torch's."""

import pytest
import torch
from torch.nn import functional

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (4, 300), (3, 5000)], ids=str)
def test_loss_and_gradient(shape, dtype, device, near):
    from vila2.kernels.softmax_error import softmax_error_triton

    logits = (torch.randn(shape) * 3).to(device, dtype)
    labels = torch.randint(0, shape[1], shape[:1], device=device)
    if len(labels) > 1:
        labels[1] = -100
    wide = logits.float().requires_grad_()
    expected = functional.cross_entropy(wide, labels, ignore_index=-100, reduction="none")
    expected.sum().backward()
    loss = softmax_error_triton(logits, labels)
    torch.testing.assert_close(loss, expected.detach(), **near(torch.float32, 5))
    torch.testing.assert_close(logits.float(), wide.grad, **near(dtype))


def test_rows_apart_are_refused(device):
    from vila2.kernels.softmax_error import softmax_error_triton

    with pytest.raises(ValueError, match="contiguous"):
        softmax_error_triton(
            torch.zeros(4, 3, device=device).t(), torch.zeros(3, dtype=torch.int64, device=device)
        )
