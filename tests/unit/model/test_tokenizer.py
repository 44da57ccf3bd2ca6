"""Tokenizers: what they add by themselves, what ends a caption, and chat templates of both shapes."""

import json
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_llava, write_nvila, write_vila15
from tests.tiny_tokenizers import CHATML, LLAVA_TEMPLATE, byte_tokenizer, llama_tokenizer, write_tokenizer
from vila2.errors import CheckpointError
from vila2.model.tokenizer import Tokenizer, TokenKind, has_chat_template, load_tokenizer

USER = [{"role": "user", "content": "<image>\nWhat is it?"}]


@pytest.fixture
def llama(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path, llama_tokenizer(), bos="<s>", eos="</s>", unk="<unk>")
    return load_tokenizer(tmp_path)


@pytest.fixture
def qwen(tmp_path: Path) -> Tokenizer:
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    write_tokenizer(tmp_path, byte_tokenizer(specials), eos="<|im_end|>", chat_template=CHATML)
    return load_tokenizer(tmp_path)


def test_a_llama_tokenizer_adds_a_bos_once_and_only_when_asked(llama: Tokenizer) -> None:
    assert (llama.bos_id, llama.adds_bos) == (1, True)
    assert llama.encode("a dog", add_bos=True) == [1, *llama.encode("a dog")]
    assert 1 not in llama.encode("a dog")


def test_a_qwen_tokenizer_adds_nothing(qwen: Tokenizer) -> None:
    assert not qwen.adds_bos
    assert qwen.encode("a dog", add_bos=True) == qwen.encode("a dog")


def test_newline_ids_are_what_the_tokenizer_makes_of_a_newline(llama: Tokenizer, qwen: Tokenizer) -> None:
    assert qwen.decode(qwen.newline_ids) == "\n"
    assert len(qwen.newline_ids) == 1
    assert llama.newline_ids[0] == 1  # the NVILA code calls the tokenizer with its BOS here
    assert llama.newline_ids[-1] == llama.token_id("<0x0A>")


@pytest.mark.parametrize("text", ["Two dogs.", "naïve 犬 🐕", "a  b\nc\n\n", ""])
def test_text_survives_a_round_trip(llama: Tokenizer, qwen: Tokenizer, text: str) -> None:
    assert llama.decode(llama.encode(text)) == text
    assert qwen.decode(qwen.encode(text)) == text


def test_decoding_skips_specials_and_ids_beyond_the_vocabulary(qwen: Tokenizer) -> None:
    ids = qwen.encode("a dog")
    assert qwen.decode([1, *ids, 2, len(qwen), 10**6, -1]) == "a dog"


def test_the_end_of_a_caption_comes_from_the_tokenizer_and_the_generation_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, llama_tokenizer(), bos="<s>", eos="</s>")
    assert load_tokenizer(tmp_path).eos_ids == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_tokenizer(tmp_path).eos_ids == {2, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_tokenizer(tmp_path).eos_ids == {2, 9}


def test_the_image_token_is_added_where_it_is_missing(qwen: Tokenizer, tmp_path: Path) -> None:
    assert qwen.image_token_id is None
    before = len(qwen)
    qwen.add_image_token()
    assert qwen.image_token_id == before
    assert qwen.encode("<image>") == [before]
    assert qwen.text_vocab_size == before  # it has no embedding, and needs none
    qwen.add_image_token()
    assert len(qwen) == before + 1


def test_a_chat_template_gets_a_string_or_parts_as_it_wants(tmp_path: Path, qwen: Tokenizer) -> None:
    assert qwen.apply_chat_template(USER).endswith(
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    folder = tmp_path / "parts"
    write_tokenizer(
        folder, llama_tokenizer(("<image>",)), bos="<s>", eos="</s>", chat_template=LLAVA_TEMPLATE
    )
    assert load_tokenizer(folder).apply_chat_template(USER) == "USER: <image>\nWhat is it? ASSISTANT:"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for x in messages %}{{ messages.append(1) }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error_and_runs_nothing(tmp_path: Path, template: str) -> None:
    write_tokenizer(tmp_path, llama_tokenizer(), bos="<s>", eos="</s>", chat_template=template)
    with pytest.raises(CheckpointError, match="chat template"):
        load_tokenizer(tmp_path).apply_chat_template(USER)


def test_without_a_template_the_error_says_what_to_do(llama: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="--template"):
        llama.apply_chat_template(USER)


@pytest.mark.parametrize("generation", ["old", "new"])
def test_a_processors_template_is_found(tmp_path: Path, generation: str) -> None:
    write_llava(tmp_path / "with", generation=generation)
    write_llava(tmp_path / "without", generation=generation, chat_template=None)
    for name, expected in (("with", True), ("without", False)):
        assert has_chat_template(tmp_path / name) is expected
        assert (load_tokenizer(tmp_path / name).chat_template is not None) is expected
    assert not has_chat_template(write_vila15(tmp_path / "vila") / "llm")
    assert has_chat_template(write_nvila(tmp_path / "nvila") / "llm")


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_a_sentencepiece_model_alone_is_enough(tmp_path: Path, settings: dict[str, bool]) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
    spm = pytest.importorskip("sentencepiece")
    write_sentencepiece(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, reference = (
        load_tokenizer(tmp_path),
        spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")),
    )
    assert tokenizer.bos_id == 1
    assert tokenizer.adds_bos is settings.get("add_bos_token", True)
    for text in ("a dog runs", "\nwhat is it", "a user ASSISTANT:", "naïve 犬  x\n"):
        assert tokenizer.encode(text) == reference.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_sentencepiece_model_without_protobuf_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sentencepiece(tmp_path)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(CheckpointError, match="pip install protobuf"):
        load_tokenizer(tmp_path)


def write_sentencepiece(folder: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    (folder / "text.txt").write_text("a dog runs on the beach\nwhat is it ASSISTANT: a user\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


def test_a_folder_without_a_tokenizer_and_one_that_wants_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_what_a_token_is_to_its_word(llama: Tokenizer, qwen: Tokenizer) -> None:
    for tokenizer in (llama, qwen):
        kinds = tokenizer.kinds()
        assert len(kinds) == len(tokenizer)
        ids = tokenizer.encode("two dogs, zzqx")
        found = [kinds[index] for index in ids]
        names = [tokenizer.name(index) for index in ids]
        assert {name[0] for name, kind in zip(names, found, strict=True) if kind == TokenKind.WORD} <= set(
            "\u2581\u0120"
        )
        assert found[-1] == TokenKind.INSIDE  # the middle of a word
        assert kinds[tokenizer.encode("a,")[-1]] == TokenKind.MARK
        assert TokenKind.LINE in {kinds[index] for index in tokenizer.encode("a\nb")}
    assert llama.kinds()[llama.encode("two")[0]] == TokenKind.WORD
    assert qwen.kinds()[qwen.encode("a dog")[1]] == TokenKind.WORD
