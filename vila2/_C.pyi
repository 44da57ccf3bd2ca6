import numpy as np
from numpy.typing import NDArray
from torch import Tensor

class PackedWeights:
    def __init__(self, weight: Tensor, bias: Tensor | None, storage: str) -> None: ...
    @staticmethod
    def over(
        panels: Tensor, bias: Tensor | None, columns: int, depth: int, storage: str
    ) -> PackedWeights: ...
    def copy_to(self, panels: Tensor, bias: Tensor | None) -> None: ...
    def multiply(self, x: Tensor, y: Tensor) -> None: ...
    def top(self, x: Tensor, banned: Tensor, is_banned: Tensor, values: Tensor, columns: Tensor) -> None: ...
    @property
    def columns(self) -> int: ...
    @property
    def padded_columns(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def has_bias(self) -> bool: ...
    @property
    def storage(self) -> str: ...

def isa() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def set_num_threads(count: int) -> None: ...
def num_threads() -> int: ...
def panel_width() -> int: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> None: ...
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, y: Tensor) -> None: ...
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, y: Tensor) -> None: ...
def silu_mul(gate_up: Tensor, y: Tensor) -> None: ...
def gelu(x: Tensor, kind: str, y: Tensor) -> None: ...
def rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_out: Tensor,
) -> None: ...
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None: ...
def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    summed: Tensor | None,
    y: Tensor,
    scales: Tensor,
) -> None: ...
def norm_grad(
    y_grad: Tensor,
    summed_grad: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    scales: Tensor,
    x_grad: Tensor,
    weight_grad: Tensor,
) -> None: ...
def silu_mul_grad(gate_up: Tensor, y_grad: Tensor, out: Tensor) -> None: ...
def gelu_grad(x: Tensor, y_grad: Tensor | None, kind: str, out: Tensor) -> None: ...
def softmax_error(logits: Tensor, labels: Tensor, losses: Tensor) -> None: ...
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    segments: Tensor,
    scale: float,
    packed: Tensor,
    log_sums: Tensor,
    out: Tensor,
) -> None: ...
def segment_attention_grad(
    out_grad: Tensor,
    positions: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    segments: Tensor,
    scale: float,
    packed: Tensor,
    log_sums: Tensor,
    out: Tensor,
    sums: Tensor,
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
) -> None: ...
def resize(
    image: NDArray[np.uint8], out: NDArray[np.uint8], interpolation: str, rows_first: bool
) -> None: ...
def image_patches(images: Tensor, patch: int, tables: Tensor, out: Tensor) -> None: ...
def quantize(x: Tensor, bytes: Tensor, scales: Tensor, zeros: Tensor, turn: int = 1) -> None: ...

class ByteWeights:
    def __init__(
        self,
        panels: Tensor,
        scales: Tensor,
        sums: Tensor,
        bias: Tensor | None,
        columns: int,
        depth: int,
        is_narrow: bool,
        turn: int = 1,
    ) -> None: ...
    def multiply(self, x: Tensor, y: Tensor, finish: str, residual: Tensor | None) -> None: ...
    def top(self, x: Tensor, banned: Tensor, is_banned: Tensor, values: Tensor, columns: Tensor) -> None: ...
    def multiply_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, y: Tensor, finish: str
    ) -> None: ...
    def multiply_layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, y: Tensor, finish: str
    ) -> None: ...
    @property
    def columns(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def is_narrow(self) -> bool: ...
