"""Projectors against plain formulas, element by element in numpy."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vila2.model.projector import Projector, ProjectorConfig
from vila2.ops.linear import pack_linears

Array = NDArray[np.float64]


def make(kind: str, width: int = 6, hidden: int = 10, column_major: bool = False) -> Projector:
    torch.manual_seed(3)
    projector = Projector(ProjectorConfig(kind, width, hidden, column_major))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return projector


def features(count: int, tokens: int, width: int = 6) -> torch.Tensor:
    return torch.randn(count, tokens, width, generator=torch.manual_seed(count + tokens))


def weights(projector: Projector) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in projector.state_dict().items()}


def linear(x: Array, w: dict[str, Array], name: str) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Array, w: dict[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def join(x: Array, factor: int, column_major: bool) -> Array:
    """One tile's features (side * side, width), cell by cell; what lies beyond the edge is zero."""
    side, width = math.isqrt(len(x)), x.shape[1]
    cells = -(-side // factor)
    order = [(i, j) for i in range(cells) for j in range(cells)]
    if column_major:
        order = [(i, j) for j in range(cells) for i in range(cells)]
    tokens = []
    for i, j in order:
        parts = []
        for row in range(i * factor, (i + 1) * factor):
            for column in range(j * factor, (j + 1) * factor):
                inside = row < side and column < side
                parts.append(x[row * side + column] if inside else np.zeros(width))
        tokens.append(np.concatenate(parts))
    return np.stack(tokens)


def two_by_two(x: Array, w: dict[str, Array], column_major: bool) -> Array:
    x = linear(norm(join(x, 2, column_major), w, "layers.1"), w, "layers.2")
    return linear(gelu(x), w, "layers.4")


def three_by_three(x: Array, w: dict[str, Array], column_major: bool) -> Array:
    x = gelu(linear(norm(join(x, 3, column_major), w, "layers.1"), w, "layers.2"))
    return linear(gelu(linear(norm(x, w, "layers.4"), w, "layers.5")), w, "layers.7")


def close(ours: torch.Tensor, expected: Array) -> None:
    assert ours.shape == expected.shape
    assert np.abs(ours.detach().numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("side", [1, 2, 4, 5, 6, 7, 9])
@pytest.mark.parametrize(
    ("kind", "column_major"),
    [
        ("mlp_downsample", False),  # NVILA
        ("mlp_downsample", True),  # VILA1.5
        ("mlp_downsample_2x2_fix", False),
        ("mlp_downsample_3x3_fix", False),
    ],
)
def test_downsampling_projectors(kind: str, column_major: bool, side: int) -> None:
    projector = make(kind, column_major=column_major)
    x = features(3, side * side)
    formula = three_by_three if "3x3" in kind else two_by_two
    expected = np.stack([formula(tile.double().numpy(), weights(projector), column_major) for tile in x])
    assert projector.num_tokens(side) == expected.shape[1]
    close(projector(x), expected)


def test_the_two_orders_of_one_type_name() -> None:
    """A 4 x 4 grid becomes cells 0 1 / 2 3: NVILA sends 0 1 2 3, VILA1.5 sends 0 2 1 3."""
    x = features(1, 16)
    rows, columns = (make("mlp_downsample", column_major=order)(x) for order in (False, True))
    assert torch.allclose(columns, rows[:, [0, 2, 1, 3]], atol=1e-5)
    assert not torch.allclose(columns, rows, atol=1e-2)


def test_linear() -> None:
    projector = make("linear")
    assert set(projector.state_dict()) == {"layers.weight", "layers.bias"}
    x = features(2, 5)
    close(projector(x), linear(x.double().numpy(), weights(projector), "layers"))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mlp(depth: int) -> None:
    projector = make(f"mlp{depth}x_gelu")
    x = features(2, 5)
    expected = linear(x.double().numpy(), weights(projector), "layers.0")
    for i in range(1, depth):
        expected = linear(gelu(expected), weights(projector), f"layers.{2 * i}")
    close(projector(x), expected)
    assert projector.num_tokens(3) == 9


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mlp2x_gelu", "02"),
        ("mlp_downsample", "124"),
        ("mlp_downsample_2x2_fix", "124"),
        ("mlp_downsample_3x3_fix", "12457"),
    ],
)
def test_weight_names_are_vilas(kind: str, names: str) -> None:
    expected = {f"layers.{i}.{part}" for i in names for part in ("weight", "bias")}
    assert set(make(kind).state_dict()) == expected


@pytest.mark.parametrize(
    ("kind", "side", "tokens"),
    [
        ("mlp_downsample", 27, 196),
        ("mlp_downsample", 32, 256),
        ("mlp_downsample_3x3_fix", 27, 81),
        ("mlp_downsample_3x3_fix", 32, 121),
        ("linear", 24, 576),
    ],
)
def test_token_counts_of_the_released_models(kind: str, side: int, tokens: int) -> None:
    assert make(kind).num_tokens(side) == tokens


def test_unknown_kinds_and_odd_feature_counts_are_refused() -> None:
    for kind in ("mlp_downsample_3x3_s2", "mlp0x_gelu", "xmlp2x_gelu", ""):
        with pytest.raises(ValueError, match="unknown projector"):
            ProjectorConfig(kind, 4, 4)
    with pytest.raises(ValueError, match="column-major"):
        ProjectorConfig("mlp_downsample_2x2_fix", 4, 4, column_major=True)
    with pytest.raises(ValueError, match="square of features, got 17"):
        make("mlp_downsample")(features(1, 17))


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "mlp_downsample", "mlp_downsample_3x3_fix"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    projector = make(kind)
    projector(features(2, 25)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "mlp_downsample", "mlp_downsample_3x3_fix"])
def test_packed_tokens_do_not_depend_on_the_batch(kind: str) -> None:
    pytest.importorskip("vila2._C")
    projector = pack_linears(make(kind, width=20, hidden=36), torch.float32)
    x = features(5, 49, width=20)
    with torch.inference_mode():
        together = projector(x)
        assert all(torch.equal(projector(x[i : i + 1]), together[i : i + 1]) for i in range(5))
