"""A small copy of a model's architecture with random weights: cheap to run, so that claims about a model can be tried.

Everything that decides *how* positions and heads are computed is kept (kinds of layers, head size, rotary settings,
scales, caps, biases, ties); only sizes shrink, and windows shrink below the length of the documents that are tried.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

VOCABULARY = 64
FIRST_WORD, LAST_WORD = 1, 40  # token ids to try things with; special tokens lie above and at 0
SHORT = 4  # windows and chunks
LARGEST = 60_000_000  # parameters; a copy that cannot be made smaller is not made

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "num_selected_experts")
_ONE_GROUP = ("n_group", "topk_group", "num_expert_group", "num_expert_groups", "moe_expert_groups")
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "index_topk",
            "chunk_size", "mamba_chunk_size")  # fmt: skip
_WIDE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


def miniature(
    config: Any, trust_remote_code: bool = False, num_experts: int = 1, keep_words: bool = False
) -> nn.Module | None:
    """A copy of two layers, or one layer of each kind, on the CPU in fp32, in evaluation mode.

    `config`: a transformers configuration of a causal language model. `num_experts`: experts of each kind in a mixture,
    half of which a token visits; with one, the shape of no matrix product depends on what the tokens are. `keep_words`:
    leave the vocabulary whole, for ids of the model's own tokenizer. Returns None where no copy can be made that is
    small enough. The global random state is left as it was. The same copy is given out again for the same
    configuration, so callers put back what they change.
    """
    key = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else str(config)
    return _build(_Keyed(key, config), trust_remote_code, num_experts, keep_words)


class _Keyed:
    """A configuration that compares by its contents."""

    def __init__(self, key: str, config: Any) -> None:
        self.key, self.config = key, config

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and other.key == self.key


@functools.lru_cache(maxsize=4)
def _build(keyed: _Keyed, trust_remote_code: bool, num_experts: int, keep_words: bool) -> nn.Module | None:
    from transformers import AutoModelForCausalLM

    from distft.model.load import parameters_on_meta

    options = {"trust_remote_code": trust_remote_code, "dtype": torch.float32}
    # Some routers cannot choose among one expert, and some sizes only fit together as they are.
    for narrow, experts in ((True, num_experts), (True, 2), (False, num_experts)):
        try:
            small = shrink(keyed.config, narrow, experts, keep_words)
            with parameters_on_meta():
                empty = AutoModelForCausalLM.from_config(copy.deepcopy(small), **options)
            if num_parameters(empty, without_words=keep_words) > LARGEST:
                continue
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(small, **options).eval()
                randomise(model)
                with torch.no_grad():
                    logits = model(input_ids=torch.arange(FIRST_WORD, FIRST_WORD + 8)[None]).logits
        except Exception:  # remote code and wrong sizes may raise anything
            continue
        if bool(logits.isfinite().all()):
            return model
    return None


def experts_of(config: Any) -> int:
    """Experts of a mixture; 1 where the model is none."""
    sizes = [getattr(part, name, None) for part in _parts(config) for name in _EXPERTS]
    return max([size for size in sizes if isinstance(size, int)], default=1)


def num_parameters(model: Any, without_words: bool) -> int:
    """Parameters of a model; `without_words`: without those of its embeddings and its head."""
    words = [model.get_input_embeddings(), model.get_output_embeddings()] if without_words else []
    left_out = {id(parameter) for module in words if module is not None for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in left_out)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights large enough that attention is far from uniform and logits reach their softcap; ties stay."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim >= 2:
            parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def shrink(config: Any, narrow: bool = True, num_experts: int = 1, keep_words: bool = False) -> Any:
    """A copy of `config` with fewer layers, words and experts, and short windows; `narrow`: fewer heads as well;
    `keep_words`: all words."""
    at_most = (
        dict.fromkeys(_EXPERTS, num_experts)
        | dict.fromkeys(_CHOSEN, max(1, num_experts // 2))
        | dict.fromkeys(_ONE_GROUP, 1)
        | dict.fromkeys(_WINDOWS, SHORT)
    )
    config = copy.deepcopy(config)
    config.use_cache = False
    for part in _parts(config):
        _shorten(part)
        if not keep_words:
            _cut_words(part)
        for name, value in list(vars(part).items()):
            if name.endswith(_WIDE) and isinstance(value, int) and value > VOCABULARY:
                setattr(part, name, VOCABULARY)
            elif name in at_most and isinstance(value, int):
                setattr(part, name, min(value, at_most[name]))
        if narrow:
            _narrow(part)
            _fit_state_heads(part)
    return config


def _parts(config: Any) -> list[Any]:
    """The configuration and every configuration inside it."""
    inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config] + [part for child in inside if child is not None for part in _parts(child)]


def _shorten(config: Any) -> None:
    num_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(num_layers, int) or num_layers <= 2:
        return
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [0] * num_layers
    kept = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    kept = sorted({*kept, *range(2 if len(kept) < 2 else 0)})
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _cut_words(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if name.endswith("vocab_size") or name.startswith("vocab_size"):
            if isinstance(value, int) and value > VOCABULARY:
                setattr(config, name, VOCABULARY)
        elif name == "pad_token_id":
            setattr(config, name, None)
        elif name.endswith(("_token_id", "_token_index")):
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, int) and (first >= VOCABULARY or isinstance(value, list)):
                setattr(config, name, LAST_WORD + 1 + first % (VOCABULARY - LAST_WORD - 1))


def _fit_state_heads(config: Any) -> None:
    """Mamba-2: heads x head size = expand x width, so narrower models have fewer of these heads."""
    for heads, size, expand in (("num_heads", "head_dim", "expand"), ("mamba_n_heads", "mamba_d_head", "mamba_expand")):
        values = [getattr(config, name, None) for name in (heads, size, expand)]
        if all(isinstance(value, int) for value in values):
            setattr(config, heads, config.hidden_size * values[2] // values[1])
            for groups in ("n_groups", "mamba_n_groups"):
                if isinstance(getattr(config, groups, None), int):
                    setattr(config, groups, 1)


def _narrow(config: Any) -> None:
    """At most two key heads with two query heads each; the head size stays, since rotary settings refer to it."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if isinstance(width, int) and not isinstance(heads, int):
        config.hidden_size = min(width, 256)
        if getattr(config, "attention_hidden_size", None) == width:  # RWKV
            config.attention_hidden_size = config.hidden_size
    if not isinstance(heads, int) or not isinstance(width, int):
        return
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or width // heads
    if not isinstance(key_heads, int) or not isinstance(head_size, int):
        return
    new_key_heads = min(key_heads, 2)
    new_heads = new_key_heads * min(heads // key_heads, 2)
    for name, value in (("num_attention_heads", new_heads), ("hidden_size", new_heads * head_size)):
        setattr(config, name, value)
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = new_key_heads
    for name in ("word_embed_proj_dim", "embedding_size"):
        if getattr(config, name, None) == width:
            setattr(config, name, new_heads * head_size)
