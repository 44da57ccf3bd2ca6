"""A user's text and images to the exact tokens that a checkpoint was trained on.

Where the images go is known here (id -1 at each visual token), what they look like is not. The texts are those of
VILA's conversation templates; how an image is set off from its text differs by generation:
- VILA1.5: each stretch of text between `<image>`s is tokenised by itself and `<image>` is followed by a newline of
  the text, so a tokenizer that writes a leading space does so after every image.
- NVILA: the text is tokenised whole with `<image>` as one token, and the tokens of "\\n" follow each image's features.
- LLaVA in transformers: tokenised whole, and a newline of the text follows `<image>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vila2.errors import UsageError
from vila2.model.tokenizer import IMAGE_PLACEHOLDER, Tokenizer

if TYPE_CHECKING:
    from vila2.model.images import PreparedImage
    from vila2.model.vlm import ModelConfig

VISUAL_TOKEN = -1

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True, slots=True)
class Template:
    """A conversation: `start`, then for each turn `user`, the user's text, `assistant`, `lead`, the answer, its end.

    `end` is the token that ends an answer and `last_end` the one that ends the last answer; None stands for the
    tokenizer's end of sequence. A prompt stops before `lead`, which the model writes itself.
    """

    start: str = ""
    user: str = ""
    assistant: str = ""
    lead: str = ""
    end: str | None = None
    last_end: str | None = None

    def prompt(self, text: str) -> str:
        """The whole prompt of one user turn."""
        return f"{self.start}{self.user}{text}{self.assistant}"


_LLAMA_3_ROLE = "<|start_header_id|>{}<|end_header_id|>\n\n".format

TEMPLATE_TEXTS: dict[str, Template] = {
    "vicuna_v1": Template(f"{_VICUNA_SYSTEM} ", "USER: ", " ASSISTANT:", " "),
    # The template writes the BOS although Llama 3's tokenizer adds one too. The models were trained with both.
    "llama_3": Template(
        f"<|begin_of_text|>{_LLAMA_3_ROLE('system')}{_LLAMA_3_SYSTEM}<|eot_id|>",
        _LLAMA_3_ROLE("user"),
        f"<|eot_id|>{_LLAMA_3_ROLE('assistant')}",
        end="<|eot_id|>",
        last_end="<|end_of_text|>",
    ),
    "hermes-2": Template(
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>user\n",
        "<|im_end|><|im_start|>assistant\n",
        end="<|im_end|>",
        last_end="<|im_end|>",
    ),
    "plain": Template(),
    "raw": Template(),
}
TEMPLATES = ("auto", *TEMPLATE_TEXTS)
_ALIASES = {"v1": "vicuna_v1"}

# What stands in the name of a released VILA1.5 checkpoint -> its template, as in VILA's own table.
_TEMPLATE_BY_NAME = {
    "vila1.5-3b": "vicuna_v1",
    "vila1.5-8b": "llama_3",
    "vila1.5-13b": "vicuna_v1",
    "vila1.5-40b": "hermes-2",
    "llama-3": "llama_3",
    "llama3": "llama_3",
}
_TURN_ENDS = ("<|eot_id|>", "<|end_of_text|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """`token_ids` with -1 at each visual token; `image_spans` says which rows of which image fill them.

    A span is (start, length, image index, chunk index): an image in `dynamic` mode has a chunk a tile.
    """

    token_ids: list[int]
    image_spans: list[tuple[int, int, int, int]]

    @property
    def header_length(self) -> int:
        """The number of tokens before the first visual one; 0 without images."""
        return self.image_spans[0][0] if self.image_spans else 0


def check_template(name: str) -> str:
    """The template's own name; UsageError with the known ones if there is none such."""
    name = _ALIASES.get(name, name)
    if name not in TEMPLATES:
        raise UsageError(f"unknown template {name!r}: choose one of {', '.join(TEMPLATES)}")
    return name


def template_of_name(path: Path) -> str | None:
    """The template of a released VILA1.5 model, by its folder's name or one above it; None if no name is known."""
    for name in reversed(path.absolute().parts):
        for part, template in _TEMPLATE_BY_NAME.items():
            if part in name.lower():
                return template
    return None


def turn_end_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that end an assistant's turn in one of our templates or in the tokenizer's own."""
    ids = {found for token in _TURN_ENDS if (found := tokenizer.token_id(token)) is not None}
    if tokenizer.chat_template is not None:
        answer = "vila2answer"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        after = tokenizer.encode(text.rpartition(answer)[2])[:1]
        ids |= {token for token in after if tokenizer.is_special(token)}
    return ids


def build_prompt(
    template: str,
    user_text: str,
    images: Sequence["PreparedImage"],
    tokenizer: Tokenizer,
    config: "ModelConfig",
) -> PromptTokens:
    """The tokens of one user turn about `images`.

    `<image>` in the text says where each image goes; without any, the images come first. ValueError if the text
    holds another number of them than there are images, or a token that the model has no embedding for.
    """
    template = check_template(template)
    text = place_images(user_text, images, config)
    if template == "auto":
        full = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    else:
        full = TEMPLATE_TEXTS[template].prompt(text)
    chunks = _encode_around_images(full, tokenizer, add_bos=not owns_bos(template, full, tokenizer))
    order = [(index, chunk) for index, image in enumerate(images) for chunk in range(image.num_placeholders)]
    if len(chunks) != len(order) + 1:
        raise ValueError(
            f"the chat template made {len(chunks) - 1} {IMAGE_PLACEHOLDER}s of {len(order)}: choose another template"
        )
    return _join(chunks, order, images, tokenizer, config)


def owns_bos(template: str, text: str, tokenizer: Tokenizer) -> bool:
    """Does the checkpoint's own chat template write the BOS itself?"""
    return template == "auto" and tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def place_images(text: str, images: Sequence["PreparedImage"], config: "ModelConfig") -> str:
    """`text` with one `<image>` a placeholder: put in front where it has none, repeated for each tile."""
    found = text.count(IMAGE_PLACEHOLDER)
    if found == 0:
        newline = "" if config.token_newline else "\n"
        text = f"{IMAGE_PLACEHOLDER}{newline}" * len(images) + text
    elif found != len(images):
        raise ValueError(f"the prompt names {found} images as {IMAGE_PLACEHOLDER}, but has {len(images)}")
    head, *tails = text.split(IMAGE_PLACEHOLDER)
    placed = [head]
    for image, tail in zip(images, tails, strict=True):
        # NVILA sets each tile off with a newline of its own, however many there are.
        tiled = image.mode == "dynamic" and image.grid is not None
        mark = f"{IMAGE_PLACEHOLDER}\n" if tiled else IMAGE_PLACEHOLDER
        placed += [mark * image.num_placeholders, tail.removeprefix("\n") if tiled else tail]
    return "".join(placed)


def _encode_around_images(text: str, tokenizer: Tokenizer, add_bos: bool) -> list[list[int]]:
    """The tokens before, between and after the `<image>`s of `text`."""
    image_id = tokenizer.image_token_id
    if image_id is None:
        first, *others = text.split(IMAGE_PLACEHOLDER)
        return [tokenizer.encode(first, add_bos), *(tokenizer.encode(chunk) for chunk in others)]
    chunks: list[list[int]] = [[]]
    for token in tokenizer.encode(text, add_bos):
        if token == image_id:
            chunks.append([])
        else:
            chunks[-1].append(token)
    return chunks


def _join(
    chunks: list[list[int]],
    order: list[tuple[int, int]],
    images: Sequence["PreparedImage"],
    tokenizer: Tokenizer,
    config: "ModelConfig",
) -> PromptTokens:
    token_ids = list(chunks[0])
    spans = []
    for (index, chunk), text_ids in zip(order, chunks[1:], strict=True):
        length = images[index].num_tokens // images[index].num_placeholders
        spans.append((len(token_ids), length, index, chunk))
        token_ids += [VISUAL_TOKEN] * length
        if config.token_newline:
            token_ids += tokenizer.newline_ids
        token_ids += text_ids
    beyond = max(token_ids, default=0)
    if beyond >= config.decoder.vocab_size:
        raise ValueError(
            f"the prompt holds the token {tokenizer.name(beyond)!r}, for which the model has no embedding"
        )
    return PromptTokens(token_ids, spans)
