"""AdamW and Muon against torch's own, masters, blocks, state."""

import pytest
import torch
from torch import nn

from tests.unit.train.test_loss import small_model
from vila2.errors import UsageError
from vila2.train.optim import (
    NEWTON_SCHULZ,
    ParamGroup,
    build_optimizer,
    fused_rows,
    is_hidden_matrix,
    orthogonal,
)

torch.set_num_threads(1)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12)).to(dtype)


def with_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def group(model, optimizer="adamw", **settings):
    return ParamGroup("all", list(model.named_parameters()), **({"lr": 1e-2} | settings), optimizer=optimizer)


def test_adamw_is_that_of_torch():
    ours, theirs = network(), network()
    optimizer = build_optimizer([group(ours, weight_decay=0.1, betas=(0.8, 0.9))], "float32")
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    plain = [p for p in theirs.parameters() if p.ndim < 2]
    expected = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=5e-3,
        betas=(0.8, 0.9),
    )
    for step in range(5):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        optimizer.step(0.5)
        expected.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_that_of_torch_up_to_its_polynomials():
    ours, theirs = network(), network()
    optimizer = build_optimizer([group(ours, "muon", lr=0.02, weight_decay=0.1)], "float32")
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    expected = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    start = [p.detach().clone() for p in matrices]
    for step in range(5):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        optimizer.step(1.0)
        expected.step()
    for first, a, b in zip(start, (p for p in ours.parameters() if p.ndim == 2), matrices, strict=True):
        moved = ((a - first).detach(), (b - first).detach())
        assert (moved[0] - moved[1]).norm() < 0.25 * moved[1].norm()
        assert torch.nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0) > 0.98
        assert 0.85 < moved[0].norm() / moved[1].norm() < 1.15


@pytest.mark.parametrize("aspect", [1.0, 1.5, 4.0])
def test_what_the_iteration_does_to_singular_values(aspect):
    """Its polynomials, in float64, on singular values from one down to far below what it can raise."""
    rows, generator = 24, torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(1, rows, rows, generator=generator, dtype=torch.float64))
    columns = int(rows * aspect)
    right, _ = torch.linalg.qr(torch.randn(1, columns, rows, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -9, rows, dtype=torch.float64)
    raised = values / values.norm()
    for a, b, c in NEWTON_SCHULZ:
        raised = a * raised + b * raised**3 + c * raised**5
    expected = (left * raised) @ right.transpose(1, 2)
    matrices = ((left * values) @ right.transpose(1, 2)).float()
    for sign in (matrices, matrices.transpose(1, 2)):
        found = orthogonal(sign)
        found = found if sign is matrices else found.transpose(1, 2)
        assert (found.double() - expected).norm() < 2e-4 * expected.norm()
    reached = raised[values / values.norm() >= 0.003]
    assert 0.70 < reached.min() <= reached.max() < 1.10


def test_orthogonal_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 8, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).double())
        assert values.max() < 1.3
        assert values.flatten().sort().values[len(values) :].min() > 0.3
    assert not orthogonal(torch.zeros(1, 4, 4)).any()


def test_blocks_of_a_fused_matrix_are_orthogonal_each_by_itself():
    torch.manual_seed(0)
    joined, parts = nn.Linear(16, 32, bias=False), [nn.Linear(16, n, bias=False) for n in (16, 8, 8)]
    with torch.no_grad():
        joined.weight.copy_(torch.cat([p.weight for p in parts]))
    gradient = torch.randn(32, 16)
    gradient[16:24] *= 100  # would drown the others in one matrix
    joined.weight.grad = gradient
    one = build_optimizer(
        [
            ParamGroup(
                "a", [("qkv.weight", joined.weight)], 0.1, optimizer="muon", blocks={"qkv.weight": (16, 8, 8)}
            )
        ],
        "float32",
    )
    one.step(1.0)
    for part, grad in zip(parts, gradient.split((16, 8, 8)), strict=True):
        part.weight.grad = grad.clone()
    several = [(f"{i}.weight", part.weight) for i, part in enumerate(parts)]
    build_optimizer([ParamGroup("b", several, 0.1, optimizer="muon")], "float32").step(1.0)
    torch.testing.assert_close(joined.weight, torch.cat([p.weight for p in parts]))


def test_fused_rows_cover_the_fused_matrices_of_a_model():
    model = small_model(kv_heads=2)
    rows = fused_rows(model)
    shapes = {name: parameter.shape[0] for name, parameter in model.named_parameters()}
    assert all(sum(blocks) == shapes[name] for name, blocks in rows.items())
    assert rows["decoder.layers.0.qkv.weight"] == (24, 12, 12)
    assert rows["decoder.layers.1.gate_up.weight"] == (40, 40)
    assert rows["vision.layers.0.qkv.weight"] == (16, 16, 16)
    assert len(rows) == 6


def test_muon_takes_hidden_matrices_only():
    model = small_model(tied=False)
    taken = {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    assert "decoder.layers.0.qkv.weight" in taken
    assert "projector.layers.2.weight" in taken
    assert "vision.layers.1.fc2.weight" in taken
    for name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight", "decoder.norm.weight"):
        assert name not in taken
    assert not any("patch_embedding" in name or "position_embedding" in name for name in taken)
    assert not any(name.endswith("bias") for name in taken)


def test_bfloat16_parameters_move_by_their_masters():
    model = network(torch.bfloat16)
    exact = network()
    with torch.no_grad():
        for parameter, start in zip(exact.parameters(), model.parameters(), strict=True):
            parameter.copy_(start.float())
    coarse = build_optimizer([group(model, lr=1e-4)], "bf16")
    fine = build_optimizer([group(exact, lr=1e-4)], "float32")
    for step in range(20):
        with_gradients(model, step)
        for a, b in zip(exact.parameters(), model.parameters(), strict=True):
            a.grad = b.grad.float()
        coarse.step(1.0)
        fine.step(1.0)
    state = coarse.state_dict()
    for name, parameter in exact.named_parameters():
        assert state[f"{name}/master"].dtype == state[f"{name}/exp_avg"].dtype == torch.float32
        torch.testing.assert_close(state[f"{name}/master"], parameter.data, rtol=0, atol=1e-6)
    for a, b in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_is_taken_over_continues_bit_for_bit(optimizer, dtype):
    precision = "float32" if dtype == torch.float32 else "bf16"
    straight, first, second = network(dtype), network(dtype), network(dtype)
    whole = build_optimizer([group(straight, optimizer)], precision)
    before = build_optimizer([group(first, optimizer)], precision)
    for step in range(6):
        with_gradients(straight, step)
        whole.step(1.0)
        if step < 3:
            with_gradients(first, step)
            before.step(1.0)
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in before.state_dict().items()}
    assert all(isinstance(value, (torch.Tensor, int)) for value in state.values())
    second.load_state_dict(first.state_dict())
    after = build_optimizer([group(second, optimizer)], precision)
    after.load_state_dict(state)
    for step in range(3, 6):
        with_gradients(second, step)
        after.step(1.0)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_other_parameters_is_refused():
    optimizer = build_optimizer([group(network())], "float32")
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"0\.weight/exp_avg on one side only"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "0.weight/exp_avg"})
    with pytest.raises(ValueError, match=r"0\.weight/exp_avg has shape \(2,\)"):
        optimizer.load_state_dict(state | {"0.weight/exp_avg": torch.zeros(2)})


def test_clipping_is_by_the_norm_of_all():
    model = network()
    optimizer = build_optimizer([group(model)], "float32")
    with_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in before]).norm().item()
    assert optimizer.clip_grad_norm(norm * 2) == pytest.approx(norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    optimizer.clip_grad_norm(1.0)
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item() == pytest.approx(
        1.0, rel=1e-4
    )
    optimizer.zero_grad()
    assert optimizer.clip_grad_norm(1.0) == 0.0


def test_parameters_without_a_gradient_stay():
    model = network()
    optimizer = build_optimizer([group(model, weight_decay=0.5)], "float32")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_wrong_settings_are_refused():
    model = network()
    with pytest.raises(UsageError, match="unknown optimizer 'sgd'"):
        build_optimizer([group(model, "sgd")], "float32")
    with pytest.raises(UsageError, match="precision must be one of"):
        build_optimizer([group(model)], "int8")
    with pytest.raises(ValueError, match="precision float32 wants float32"):
        build_optimizer([group(network(torch.bfloat16))], "float32")
    with pytest.raises(ValueError, match="are one parameter"):
        build_optimizer([group(model), group(model)], "float32")
    with pytest.raises(ValueError, match="its blocks"):
        build_optimizer([group(model, "muon", blocks={"0.weight": (3, 3)})], "float32")
