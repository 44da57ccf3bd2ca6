"""The same decoder in another basis of its residual stream, in which activations have no outliers.

An RMS norm without a weight commutes with a rotation Q, and norm weights can be folded into the products that
follow. So every reader of the residual stream takes Q in, every writer turns its output by it, and the model computes
the same function; but a token's large values, which sit in a few channels, are spread over all of them, and its
rounding to a byte costs several times less. The values inside an attention head are turned alike.
(SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456.)
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vila2.model.decoder import Decoder, DecoderLayer
from vila2.model.projector import Projector
from vila2.ops.linear import Linear

_MOST_HADAMARD = 512
LEADER = 0


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix of a power of two, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    assert len(matrix) == size, size
    return matrix / size**0.5


class Rotation:
    """An orthogonal Q of `size`: random signs, a Hadamard matrix on blocks, a random rotation across them.

    Applied in size * (block + blocks) steps instead of size^2; a function of `size`, `seed` and `leaders` alone.

    `leaders` (2, size), orthonormal, are directions that would widen the range of every row: the first is turned to
    one value in all channels but LEADER, which the zero point of a row's bytes takes up; the second to LEADER alone.
    """

    def __init__(self, size: int, seed: int = 0, leaders: Tensor | None = None) -> None:
        rng = torch.Generator().manual_seed(seed)
        block = min(size & -size, _MOST_HADAMARD)
        self.size = size
        self.signs = torch.randint(0, 2, (size,), generator=rng).double() * 2 - 1
        self.within = hadamard(block)
        across = torch.randn(size // block, size // block, generator=rng, dtype=torch.float64)
        self.across = torch.linalg.qr(across).Q
        self.mirrors: list[Tensor] = []
        if leaders is not None and size > 2:
            targets = torch.zeros(2, size, dtype=torch.float64)
            targets[1, LEADER] = 1
            targets[0] = (1 - targets[1]) / (size - 1) ** 0.5
            for leader, target in zip(leaders.double(), targets, strict=True):
                normal = self.rows(leader) - target  # at right angles to the targets before
                length = normal.norm()
                if length > 1e-9:
                    self.mirrors.append(normal / length)

    def rows(self, x: Tensor) -> Tensor:
        """`x @ Q` for rows (..., size), computed in float64 and rounded to the type of `x`."""
        parts = (x.double() * self.signs).view(*x.shape[:-1], len(self.across), len(self.within))
        turned = torch.einsum("...mb,mn->...nb", parts @ self.within, self.across)
        turned = turned.reshape(x.shape)
        for normal in self.mirrors:
            turned = turned - 2 * (turned @ normal)[..., None] * normal
        return turned.to(x.dtype)

    def columns(self, weight: Tensor) -> Tensor:
        """`Q.T @ weight` for a weight (size, in) or a bias (size,)."""
        return self.rows(weight) if weight.dim() == 1 else self.rows(weight.T).T.contiguous()


@torch.no_grad()
def rotate_decoder(decoder: Decoder, projector: Projector, rotation: Rotation | None = None) -> None:
    """Turn the residual stream of an unpacked model, in place. The head is no longer tied to the embeddings."""
    rotation = rotation or Rotation(decoder.config.hidden_size)
    # Before the embeddings change: a tied head reads them as they are.
    head = rotation.rows(decoder.lm_head.weight * decoder.norm.weight)
    decoder.config = replace(decoder.config, tie_embeddings=False)
    decoder.lm_head.weight = nn.Parameter(head, requires_grad=False)
    decoder.norm.weight.fill_(1.0)
    _set_in_parts(decoder.embed_tokens.weight, rotation)
    _write(last_linear(projector), rotation)
    within = Rotation(decoder.config.head_dim)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        for norm, product in ((layer.attn_norm, layer.qkv), (layer.mlp_norm, layer.gate_up)):
            product.weight.copy_(rotation.rows(product.weight * norm.weight))
            norm.weight.fill_(1.0)
        _turn_values(layer, within)
        _write(layer.o, rotation)
        _write(layer.down, rotation)


def _turn_values(layer: DecoderLayer, rotation: Rotation) -> None:
    """Turn the values of each head, which attention only averages, and turn them back in the product that follows."""
    config = layer.config
    start, heads, dim = config.q_size + config.kv_size, config.num_kv_heads, config.head_dim
    for parameter in (layer.qkv.weight, layer.qkv.bias):
        if parameter is not None:
            values = parameter[start:].view(heads, dim, -1)
            parameter[start:] = rotation.rows(values.mT).mT.reshape(parameter[start:].shape)
    mixed = layer.o.weight.view(-1, config.num_heads, dim)
    layer.o.weight.copy_(rotation.rows(mixed).view(layer.o.weight.shape))


def last_linear(projector: Projector) -> Linear:
    """The product that writes visual tokens."""
    linears = [module for module in projector.modules() if isinstance(module, Linear)]
    return linears[-1]


def _write(product: Linear, rotation: Rotation) -> None:
    product.weight.copy_(rotation.columns(product.weight))
    if product.bias is not None:
        product.bias.copy_(rotation.columns(product.bias))


def _set_in_parts(table: Tensor, rotation: Rotation) -> None:
    for rows in torch.split(table, 8192):  # a vocabulary in float64 would take much memory
        rows.copy_(rotation.rows(rows))
