"""The decoder against transformers' Llama and Qwen2: random weights, float32, odd batches without padding."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from vila2.errors import CheckpointError
from vila2.model.decoder import Decoder, DenseAttend
from vila2.model.hf_config import decoder_config, decoder_json
from vila2.model.weight_map import decoder_table

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, all heads": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama, wide heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "llama, biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama 3 rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2, tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str) -> tuple[PreTrainedModel, Decoder]:
    config_class, model_class, changes = MODELS[name]
    torch.manual_seed(0)
    theirs = model_class(config_class(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for (
            parameter
        ) in theirs.parameters():  # biases start at zero and norms at one: that would hide a mix-up
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs, convert(theirs)


def convert(theirs: PreTrainedModel) -> Decoder:
    config = decoder_config(theirs.config.to_dict(), "here")
    ours = Decoder(config)
    state: dict[str, list[Tensor]] = {}
    for name, (own, shape) in decoder_table(config).items():
        tensor = theirs.state_dict()[name]
        assert tensor.shape == shape, name
        state.setdefault(own, []).append(tensor)
    joined = {own: torch.cat(parts) for own, parts in state.items()}
    ours.load_state_dict(joined, strict=not config.tie_embeddings)
    return ours.eval()


def run(ours: Decoder, sequences: list[Tensor]) -> list[Tensor]:
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    attend = DenseAttend(positions, lengths, ours.cos, ours.sin)
    return list(ours(ours.embed(torch.cat(sequences)), attend).split(lengths))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [(1,), (7,), (13, 1, 64), (5, 5, 200, 3, 31)])
def test_hidden_states_and_logits_equal_transformers(name: str, lengths: tuple[int, ...]) -> None:
    theirs, ours = build(name)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 97, (length,), generator=generator) for length in lengths]
    with torch.no_grad():
        outputs = run(ours, sequences)
        for sequence, hidden in zip(sequences, outputs, strict=True):
            expected = theirs.model(sequence[None]).last_hidden_state[0]
            assert distance(hidden, expected) < 1e-5
            assert distance(ours.logits(hidden), theirs.lm_head(expected)) < 1e-5


def test_sequences_do_not_see_each_other_or_the_future() -> None:
    _, ours = build("qwen2")
    first, second = torch.arange(9), torch.arange(20, 31)
    with torch.no_grad():
        together = run(ours, [first, second])
        assert torch.allclose(together[1], run(ours, [second])[0], atol=1e-5)
        changed = run(ours, [torch.cat((first[:-1], first[-1:] + 1)), second])
        assert torch.equal(changed[0][:-1], together[0][:-1])
        assert not torch.allclose(changed[0][-1], together[0][-1])


def test_the_embeddings_passed_in_are_left_as_they_were() -> None:
    _, ours = build("llama")
    embeddings = ours.embed(torch.arange(6)).detach()
    before = embeddings.clone()
    with torch.no_grad():
        ours(embeddings, DenseAttend(torch.arange(6), [6], ours.cos, ours.sin))
    assert torch.equal(embeddings, before)


def test_gradients_equal_transformers() -> None:
    theirs, ours = build("qwen2")
    ids = torch.arange(11)
    ours.logits(run(ours, [ids])[0]).logsumexp(-1).sum().backward()
    theirs(ids[None]).logits.logsumexp(-1).sum().backward()
    layer, expected = ours.layers[1], theirs.model.layers[1]
    assert distance(ours.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad) < 1e-5
    assert distance(layer.qkv.weight.grad[:48], expected.self_attn.q_proj.weight.grad) < 1e-5
    assert distance(layer.gate_up.weight.grad[80:], expected.mlp.up_proj.weight.grad) < 1e-5


def test_tables_stay_float32_and_ties_survive_a_move_off_the_meta_device() -> None:
    config = decoder_config(LlamaConfig(**SMALL, tie_word_embeddings=True).to_dict(), "here")
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to(torch.bfloat16).to_empty(device="cpu")
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    assert decoder.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(decoder.cos, Decoder(config).cos)
    assert decoder.cos.dtype == decoder.sin.dtype == torch.float32
    assert decoder.state_dict().keys() == Decoder(config).state_dict().keys()
    assert "cos" not in decoder.state_dict()


def test_a_wrong_count_of_positions_is_refused() -> None:
    table = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="5 tokens in all, but 4 positions"):
        DenseAttend(torch.arange(4), [3, 2], table, table)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_survives_being_written(name: str) -> None:
    config_class, _, changes = MODELS[name]
    config = decoder_config(config_class(**{**SMALL, **changes}).to_dict(), "here")
    assert decoder_config(decoder_json(config), "there") == config


def test_old_and_new_rope_keys_mean_the_same() -> None:
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    new = decoder_config({**SMALL, "rope_parameters": LLAMA3_ROPE}, "new")
    old = decoder_config({**SMALL, "rope_theta": 500000.0, "rope_scaling": scaling}, "old")
    older = {**scaling, "type": scaling["rope_type"]}
    del older["rope_type"]
    assert new == old
    assert new.rope_theta == 500000.0
    oldest = decoder_config({**SMALL, "rope_theta": 500000.0, "rope_scaling": older}, "oldest")
    assert torch.equal(Decoder(oldest).cos, Decoder(new).cos)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral' is not supported; known are llama, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128}, "sliding window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 4}, "6 heads cannot share 4"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised \\(awq\\)"),
        ({"hidden_size": "wide"}, "there/config.json"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decoder_config({**SMALL, "model_type": "llama", **changes}, "there/config.json")
