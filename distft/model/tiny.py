"""`model=tiny`: a small Llama with random weights and a tokenizer trained from the run's own text, built and cached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers
import xxhash

from distft.config.schema import TinyShape
from distft.errors import UserMistake
from distft.weights.write import new_folder, write_sharded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, TURN_START, TURN_END, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, PADDING)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
MAX_POSITIONS = 32_768
TOKENIZER_BYTES = 8 * 1024**2  # text that the tokenizer is trained on: about two seconds
WEIGHTS_SEED = 0
RECIPE = 1  # raise when what is built from the same input changes

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""ChatML; what the model says, stop token included, lies between generation markers."""


def build_tiny(shape: TinyShape, texts: Callable[[], Iterable[str]], cache: Path) -> Path:
    """The model's folder under `cache`, built unless it is there: the text, the shape and the versions name it.

    Raises:
        UserMistake: the shape is impossible, or there is no text.
    """
    check_shape(shape)
    sample, text_hash = sample_of(texts())
    versions = [torch.__version__, transformers.__version__, tokenizers.__version__, RECIPE]
    key = xxhash.xxh3_64(json.dumps([asdict(shape), text_hash, versions]).encode()).hexdigest()
    folder = cache / "models" / f"tiny-{key}"
    if (folder / "config.json").exists():
        return folder
    with new_folder(folder, replace=False) as staging:
        tokenizer = wrap(train_tokenizer(sample, shape.vocab_size))
        tokenizer.save_pretrained(staging)
        write_model(shape, tokenizer, staging)
    return folder


def check_shape(shape: TinyShape) -> None:
    """Refuse shapes that no Llama can have."""
    for name, value in asdict(shape).items():
        if value < 1:
            raise UserMistake(f"model.tiny.{name}={value} must be at least 1.")
    if shape.vocab_size < SMALLEST_VOCABULARY:
        raise UserMistake(
            f"model.tiny.vocab_size={shape.vocab_size} cannot hold 256 bytes and {len(SPECIAL_TOKENS)} special tokens; "
            f"set it to {SMALLEST_VOCABULARY} or more."
        )
    if shape.hidden_size % shape.num_heads or shape.hidden_size // shape.num_heads % 2:
        raise UserMistake(
            f"model.tiny.hidden_size={shape.hidden_size} must be an even multiple of "
            f"model.tiny.num_heads={shape.num_heads}; for example {2 * 16 * shape.num_heads}."
        )
    if shape.num_heads % shape.num_kv_heads:
        raise UserMistake(
            f"model.tiny.num_heads={shape.num_heads} must be a multiple of "
            f"model.tiny.num_kv_heads={shape.num_kv_heads}; set model.tiny.num_kv_heads={shape.num_heads}."
        )


def sample_of(texts: Iterable[str]) -> tuple[list[str], str]:
    """The first texts, up to TOKENIZER_BYTES, and their hash."""
    sample: list[str] = []
    digest, num_bytes = xxhash.xxh3_128(), 0
    for text in texts:
        encoded = text.encode("utf-8", errors="replace")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        sample.append(encoded.decode("utf-8"))
        num_bytes += len(encoded)
        if num_bytes >= TOKENIZER_BYTES:
            break
    if num_bytes == 0:
        raise UserMistake("model=tiny trains its tokenizer from the run's text, but there is none: check data.path.")
    return sample, digest.hexdigest()


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) that takes digits one by one; any text survives it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer) -> Any:
    """The tokenizer as transformers knows it, with its chat template."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PADDING,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def write_model(shape: TinyShape, tokenizer: Any, folder: Path) -> None:
    """Config, generation config and weights; the same bits every time."""
    stop, padding = (tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, PADDING))
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=padding,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(WEIGHTS_SEED)
        model = transformers.LlamaForCausalLM(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=stop, pad_token_id=padding).save_pretrained(folder)
    write_sharded(folder, model.named_parameters())
