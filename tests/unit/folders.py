"""Small real models in folders, for tests that load, tune and save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from distft.config.schema import Run
from distft.model.load import build, finish_buffers, open_weights
from distft.model.plain import quiet
from distft.weights.store import Weights

VOCAB = 120
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT2_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama, tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama 3 rope": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(
        **{key: value for key, value in SHAPE.items() if key not in ("head_dim", "num_key_value_heads")}
    ),
    "gpt-j, tables a layer": lambda: transformers.GPTJConfig(**GPT2_SHAPE, rotary_dim=4),
    "gpt2": lambda: transformers.GPT2Config(**GPT2_SHAPE),
    "mixtral, experts apart": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3 moe, experts apart": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "hrm text, projections fused": lambda: transformers.HrmTextConfig(
        **{key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "num_hidden_layers")},
        num_hidden_layers=1,
        H_cycles=1,
        L_cycles=1,
        L_bp_cycles=[1],
    ),
    "deepseek v3, stored buffer": lambda: transformers.DeepseekV3Config(
        **{key: value for key, value in SHAPE.items() if key not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose every parameter is random, norms and biases too, so that a lost or swapped one shows."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.2 if parameter.dim() == 1 else 0.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
    return model.eval()


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    with quiet():
        model.save_pretrained(folder, **kwargs)
    return folder


def plain(folder: Path) -> Any:
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(length: int = 13, rows: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, input_ids: Tensor | None = None) -> Tensor:
    return model.eval()(input_ids=ids() if input_ids is None else input_ids).logits


def born(folder: Path, run: Run | None = None) -> tuple[Any, Weights]:
    """The architecture on meta, and the folder's weights by its names."""
    with torch.device("meta"):
        model = build(folder, run or Run())
    return model, open_weights(folder, model)


@torch.no_grad()
def fill(model: Any, weights: Weights) -> Any:
    """What an engine does with one rank: memory, buffers, then every weight by name."""
    model.to_empty(device="cpu")
    finish_buffers(model, torch.device("cpu"))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in weights.names():
        tensors[name].copy_(weights.read(name).view(tensors[name].shape))
    return model.eval()


def tokenizer() -> Any:
    """A byte-level tokenizer of VOCAB tokens that knows a few letters, with a stop token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*(chr(code) for code in range(ord("a"), ord("z") + 1)), "Ġ", "Ċ", "?", "!"]
    words = ["<s>", "</s>", "<pad>", *letters, *(letter for letter in alphabet if letter not in letters)][:VOCAB]
    core = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}{{ m['content'] + ('</s>' if m['role'] == 'assistant' else '?') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '!' }}{% endif %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
