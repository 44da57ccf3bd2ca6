"""Vision towers: SigLIP and CLIP up to the layer whose features a checkpoint selects.

Parameter names against those of transformers (`SiglipVisionModel`, `CLIPVisionModel`) are in `HF_RENAMES`; q, k and
v are one matrix `qkv` here, in that order, and the patch convolution is a matrix product, so that uint8 tiles go
straight in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vila2.ops.activations import GELU_KINDS, gelu
from vila2.ops.linear import Linear
from vila2.ops.norms import add_layer_norm, layer_norm
from vila2.ops.patches import image_patches, image_patches_reference

KINDS = ("siglip", "clip")
# "patch" (VILA) and "default" (transformers) drop token 0; "cls_patch" and "full" keep every token.
SELECT_FEATURES = ("patch", "default", "cls_patch", "full")

# Parts of a name in a transformers vision model (without `vision_model.`) -> ours, replaced in this order.
HF_RENAMES = (
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.", "patch_embedding."),
    ("embeddings.position_embedding.weight", "position_embedding"),
    ("pre_layrnorm.", "pre_norm."),
    ("encoder.layers.", "layers."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.out_proj.", ".out."),
    (".self_attn.", "."),
    (".mlp.", "."),
)
_HF_PREFIXES = ("model.", "vision_tower.", "vision_model.")
_HF_UNUSED = ("embeddings.position_ids", "post_layernorm.", "head.")

# Tiles per pass through the tower: enough for wide matrix products, few enough that activations stay in memory.
_TILES_PER_PASS = 32


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A tower and what to take from it: `hidden_states[select_layer]` in transformers' counting (0: embeddings)."""

    kind: str
    image_size: int
    patch_size: int
    width: int
    inner_width: int
    num_layers: int
    num_heads: int
    activation: str
    norm_eps: float
    select_layer: int = -2
    select_feature: str = "patch"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("activation", self.activation, GELU_KINDS),
            ("select_feature", self.select_feature, SELECT_FEATURES),
        ):
            if value not in known:
                raise ValueError(f"unknown vision {name} {value!r}: expected one of {', '.join(known)}")
        if self.width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {self.width}")
        if not 1 <= self.patch_size <= self.image_size:
            raise ValueError(f"patch_size must lie in [1, {self.image_size}], got {self.patch_size}")
        if not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ValueError(
                f"select_layer {self.select_layer} is outside a tower of {self.num_layers} layers"
            )

    @property
    def num_layers_run(self) -> int:
        """How many layers the selected features need; those above are neither built nor run."""
        return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Tokens inside the tower."""
        return self.grid_side**2 + (self.kind == "clip")

    @property
    def drops_first(self) -> bool:
        """Whether token 0 is dropped: whatever it is, as transformers and VILA do."""
        return self.select_feature in ("patch", "default")

    @property
    def num_tokens(self) -> int:
        """Tokens that come out of the tower for one tile."""
        return self.num_positions - self.drops_first


class LayerNorm(nn.LayerNorm):
    """Layer norm by `vila2.ops`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis."""
        return layer_norm(input, self.weight, self.bias, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`(norm(x + residual), x + residual)`; consumes `residual`."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class VisionLayer(nn.Module):
    """Pre-norm self-attention and MLP, each added to its input."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.activation = config.activation
        self.norm1 = LayerNorm(config.width, eps=config.norm_eps)
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.norm2 = LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = Linear(config.width, config.inner_width)
        self.fc2 = Linear(config.inner_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(tiles, tokens, width) to the same."""
        tiles, tokens, width = x.shape
        qkv = self.norm_qkv(x).view(tiles, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (tiles, heads, tokens, dim)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.add_products(attended.transpose(1, 2).reshape(tiles, tokens, width), x)

    # Where products take along what is beside them, a subclass has these otherwise.

    def norm_qkv(self, x: Tensor) -> Tensor:
        """`qkv` of the normed input."""
        return self.qkv(self.norm1(x))

    def add_products(self, mixed: Tensor, x: Tensor) -> Tensor:
        """`x` plus the product after attention, and to that the MLP of it, normed."""
        normed, x = self.norm2.of_sum(x, self.out(mixed))
        return x + self.fc2(gelu(self.fc1(normed), self.activation))


class VisionTower(nn.Module):
    """Tiles to features. `image_mean` and `image_std` are the checkpoint's, for values in 0..1."""

    def __init__(
        self,
        config: VisionConfig,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.config = config
        self.image_mean = image_mean
        self.image_std = image_std
        clip = config.kind == "clip"
        self.patch_embedding = Linear(3 * config.patch_size**2, config.width, bias=not clip)
        self.class_embedding = nn.Parameter(torch.zeros(config.width)) if clip else None
        self.position_embedding = nn.Parameter(torch.zeros(config.num_positions, config.width))
        self.pre_norm = LayerNorm(config.width, eps=config.norm_eps) if clip else None
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers_run))

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles (N, size, size, 3) to the selected features (N, tokens, width), a bounded number at a time.

        Tiles hold grey levels 0..255: uint8, or floating point where a model has resampled them.
        """
        size = self.config.image_size
        if tiles.shape[1:] != (size, size, 3):
            raise ValueError(f"tiles must be (N, {size}, {size}, 3), got {tuple(tiles.shape)}")
        return torch.cat([self._pass(part) for part in torch.split(tiles, _TILES_PER_PASS)])

    def _pass(self, tiles: Tensor) -> Tensor:
        cut = image_patches_reference if tiles.is_floating_point() else image_patches
        dtype = self.position_embedding.dtype
        x = self.patch_embedding(cut(tiles, self.config.patch_size, self.image_mean, self.image_std, dtype))
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        x = x + self.position_embedding
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:] if self.config.drops_first else x


def strip_hf_prefix(name: str) -> str:
    """A weight's name without `vision_tower.`, `vision_model.` and the like: both generations of transformers."""
    for prefix in _HF_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def hf_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """The weights a checkpoint must hold for this tower: transformers' names without prefix -> shapes."""
    width, inner, patch = config.width, config.inner_width, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (config.num_positions, width),
    }
    if config.kind == "clip":
        shapes["embeddings.class_embedding"] = (width,)
        shapes |= {"pre_layrnorm.weight": (width,), "pre_layrnorm.bias": (width,)}
    else:
        shapes["embeddings.patch_embedding.bias"] = (width,)
    products = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    products |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for i in range(config.num_layers_run):
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
        for name, shape in products.items():
            shapes |= {
                f"encoder.layers.{i}.{name}.weight": shape,
                f"encoder.layers.{i}.{name}.bias": shape[:1],
            }
    return shapes


def is_unused(name: str, config: VisionConfig) -> bool:
    """Whether a weight (transformers' name without prefix) belongs to the model but not to the selected features."""
    if name.startswith(_HF_UNUSED):
        return True
    parts = name.split(".")
    if parts[:2] != ["encoder", "layers"] or len(parts) < 4 or not parts[2].isdigit():
        return False
    return config.num_layers_run <= int(parts[2]) < config.num_layers
