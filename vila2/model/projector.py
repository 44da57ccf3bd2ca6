"""The projector: features of the vision tower to embeddings of the language model.

Weights are named `layers.<i>.weight|bias` by their place in VILA's Sequential (`linear`: `layers.weight|bias`).
"""

import math
import re
from dataclasses import dataclass

from torch import Tensor, nn

from vila2.model.vision import LayerNorm
from vila2.ops.activations import gelu
from vila2.ops.downsample import downsample, downsample_norm
from vila2.ops.linear import Linear

# Features of factor x factor neighbours are joined into one token.
_DOWNSAMPLE_FACTORS = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")
KNOWN_KINDS = ("linear", "mlp<N>x_gelu", *_DOWNSAMPLE_FACTORS)


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """`column_major`: tokens leave column by column, as VILA1.5's `mlp_downsample` was trained; NVILA's leave row
    by row under the same type name. LLaVA's projector is `mlp2x_gelu`."""

    kind: str
    input_width: int
    hidden_size: int
    column_major: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("linear", *_DOWNSAMPLE_FACTORS) and not _MLP.fullmatch(self.kind):
            raise ValueError(f"unknown projector {self.kind!r}: expected one of {', '.join(KNOWN_KINDS)}")
        if self.column_major and self.kind != "mlp_downsample":
            raise ValueError(f"only mlp_downsample has a column-major generation, not {self.kind}")

    @property
    def factor(self) -> int:
        """Side of the square of features that becomes one token."""
        return _DOWNSAMPLE_FACTORS.get(self.kind, 1)

    def num_tokens(self, num_features: int) -> int:
        """Tokens made of one tile's `num_features` features; a downsampling projector needs a square of them."""
        if self.factor == 1:
            return num_features
        side = math.isqrt(num_features)
        if side * side != num_features:
            raise ValueError(f"{self.kind} needs a square of features, got {num_features}")
        return math.ceil(side / self.factor) ** 2


class Downsample(nn.Module):
    """Join factor x factor neighbours into one token; an incomplete right or bottom edge is filled with zeros."""

    def __init__(self, factor: int, column_major: bool) -> None:
        super().__init__()
        self.factor = factor
        self.column_major = column_major

    def forward(self, features: Tensor) -> Tensor:
        """(tiles, side * side, width) to (tiles, tokens, factor * factor * width); a token's parts in row order."""
        return downsample(features, self.factor, self.column_major)


class DownsampleSequential(nn.Sequential):
    """A `Downsample`, the norm after it in the same pass over memory, and then the rest."""

    def forward(self, input: Tensor) -> Tensor:
        """(tiles, features, width) to (tiles, tokens, hidden_size)."""
        join, norm, *rest = self
        assert isinstance(join, Downsample)
        assert isinstance(norm, LayerNorm)
        x = downsample_norm(input, join.factor, join.column_major, norm.weight, norm.bias, norm.eps)
        for module in rest:
            x = module(x)
        return x


class Gelu(nn.Module):
    """Exact GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return gelu(x, "gelu")


class Projector(nn.Module):
    """Features (tiles, features, input_width) to visual tokens (tiles, tokens, hidden_size)."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = _build(config)

    def forward(self, features: Tensor) -> Tensor:
        """Project each tile by itself."""
        self.config.num_tokens(features.shape[1])  # refuses features that form no square
        return self.layers(features)

    def num_tokens(self, side: int) -> int:
        """Tokens made of one tile of side x side features."""
        return self.config.num_tokens(side * side)


def _build(config: ProjectorConfig) -> nn.Module:
    width, hidden, bias = config.input_width, config.hidden_size, config.bias
    if config.kind == "linear":
        return Linear(width, hidden, bias=bias)
    if match := _MLP.fullmatch(config.kind):
        modules: list[nn.Module] = [Linear(width, hidden, bias=bias)]
        for _ in range(int(match[1]) - 1):
            modules += [Gelu(), Linear(hidden, hidden, bias=bias)]
        return nn.Sequential(*modules)
    joined = width * config.factor**2
    modules = [Downsample(config.factor, config.column_major), LayerNorm(joined)]
    if config.factor == 3:
        modules += [Linear(joined, 3 * width, bias=bias), Gelu(), LayerNorm(3 * width)]
        joined = 3 * width
    return DownsampleSequential(
        *modules, Linear(joined, hidden, bias=bias), Gelu(), Linear(hidden, hidden, bias=bias)
    )
