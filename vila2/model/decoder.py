"""Llama and Qwen2 decoders over a flat list of tokens: (T, hidden) in, (T, hidden) out, no padding.

The decoder knows nothing of a cache. Whoever calls it passes `attend(layer, q, k, v)`, which applies the
rotary positions and returns the attention output: a paged cache in the engine, `DenseAttend` in training and
tests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vila2.ops.activations import silu_mul
from vila2.ops.embedding import embed
from vila2.ops.head import head_scores, head_top
from vila2.ops.linear import Linear
from vila2.ops.norms import add_rms_norm
from vila2.ops.rope import apply_rope, rope_tables
from vila2.ops.top import finds_top

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder. `rope_scaling` is the dict of a Hugging Face config, or None."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    qkv_bias: bool = False  # Qwen2, and Llama with attention_bias
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly"
            )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


class RMSNorm(nn.Module):
    """The weight of an RMS norm, applied to the sum of a block's output and the residual."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`(norm(x + residual), x + residual)`; consumes `residual`."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """The weights of one block. The rows of `qkv` are q, k, v in that order; those of `gate_up` gate, up."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.attn_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv = Linear(hidden, config.q_size + 2 * config.kv_size, bias=config.qkv_bias)
        self.o = Linear(config.q_size, hidden, bias=config.o_bias)
        self.mlp_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up = Linear(hidden, 2 * inner, bias=config.mlp_bias)
        self.down = Linear(inner, hidden, bias=config.mlp_bias)
        self.config = config

    def forward(
        self, hidden: Tensor, residual: Tensor, attend: Attend, index: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The block's output and the residual to add it to, of all rows or of `rows`; consumes `residual`."""
        config = self.config
        qkv, residual = self.norm_qkv(hidden, residual)
        q, k, v = torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        mixed = attend(
            index,
            q.view(-1, config.num_heads, config.head_dim),
            k.view(-1, config.num_kv_heads, config.head_dim),
            v.view(-1, config.num_kv_heads, config.head_dim),
        )
        if rows is not None:
            mixed, residual = mixed.index_select(0, rows), residual.index_select(0, rows)
        return self.norm_mlp(self.o(mixed), residual)

    # Where products take the norm before them or the activation after them along, a subclass has these otherwise.

    def norm_qkv(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`qkv` of the normed sum, and the sum; consumes `residual`."""
        normed, residual = self.attn_norm(hidden, residual)
        return self.qkv(normed), residual

    def norm_mlp(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP of the normed sum, and the sum; consumes `residual`."""
        normed, residual = self.mlp_norm(hidden, residual)
        return self.down(silu_mul(self.gate_up(normed))), residual


class Decoder(nn.Module):
    """A Llama or Qwen2 language model.

    `cos` and `sin` (max_positions, head_dim / 2) are float32 in every precision and follow the module from
    device to device, but are not part of its state.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._restore()

    def _restore(self) -> None:
        config = self.config
        if config.tie_embeddings and self.lm_head.weight is not None:
            self.lm_head.weight = self.embed_tokens.weight
        device = self.norm.weight.device
        for name, table in zip(
            ("cos", "sin"),
            rope_tables(config.head_dim, config.rope_theta, config.max_positions, config.rope_scaling),
            strict=True,
        ):
            self.register_buffer(name, table.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        # A move off the meta device unties shared weights and leaves buffers without values, and a change of
        # dtype would round the tables: make both again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore()
        return self

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings of `token_ids` (T,), to (T, hidden), in the type of the norms' weights."""
        return embed(token_ids, self.embed_tokens.weight, self.norm.weight.dtype)

    def forward(self, embeddings: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Final-normed hidden states (T, hidden) of `embeddings` (T, hidden), which are left as they were.

        `attend(layer, q (T, H, D), k (T, KVH, D), v (T, KVH, D))` returns (T, H * D); q, k and v are views
        into one tensor and not yet rotated. `rows` (n,) int64: only these come out, (n, hidden), and past its
        attention the last layer works on them alone.
        """
        hidden, residual = embeddings, torch.zeros_like(embeddings)  # the ops may write into the residual
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            hidden, residual = layer(hidden, residual, attend, index, rows if index == last else None)
        return self.norm(hidden, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token scores (n, vocab) of final-normed `hidden` (n, hidden)."""
        return head_scores(hidden, self.lm_head)

    @property
    def finds_top(self) -> bool:
        """Whether `top` is faster than `logits`."""
        return finds_top(self.lm_head)

    def top(self, hidden: Tensor, count: int, banned: Tensor, is_banned: Tensor) -> tuple[Tensor, Tensor]:
        """The `count` best scores of each row of `hidden` and their tokens, as `vila2.ops.top.top_reference`."""
        return head_top(hidden, self.lm_head, count, banned, is_banned)


class DenseAttend:
    """Block-diagonal causal attention without a cache, differentiable: for training and for parity tests.

    `positions` (T,) int64; `seq_lens` are the lengths of the sequences that lie one after another in T rows.
    """

    def __init__(self, positions: Tensor, seq_lens: Sequence[int], cos: Tensor, sin: Tensor) -> None:
        if sum(seq_lens) != len(positions):
            raise ValueError(f"sequences of {sum(seq_lens)} tokens in all, but {len(positions)} positions")
        self.positions, self.seq_lens, self.cos, self.sin = positions, list(seq_lens), cos, sin

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = apply_rope(q, self.positions, self.cos, self.sin)
        k = apply_rope(k, self.positions, self.cos, self.sin)
        outputs = []
        for rows in _spans(self.seq_lens):
            q_seq, k_seq, v_seq = (
                x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)
            )  # (1, heads, n, dim)
            out = functional.scaled_dot_product_attention(
                q_seq, k_seq, v_seq, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.squeeze(0).transpose(0, 1).flatten(1))
        return torch.cat(outputs)


def _spans(lengths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
