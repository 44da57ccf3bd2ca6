"""A language model in the transformers layout as a transformers model: what quantisation tools work on."""

from pathlib import Path
from typing import Any

import torch


def load_causal_lm(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Load `folder` (config.json and safetensors) without remote code."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    return model.to(device).eval()
