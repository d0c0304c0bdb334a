"""From a causal language model to the answers that training needs: the head is asked at supervised positions only.

The model keeps its modules and names. Its own forward would put scale and softcap on whatever the head returns, so on
this instance the way from hidden states to logits is ours, checked against the model's own on a small copy. A model
that does more there takes its own forward, slower.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.errors import UserMistake
from distft.model.cross_entropy import Room
from distft.model.loss import HeadRequest, Tail, head_forward, tail_of
from distft.model.miniature import FIRST_WORD, miniature


class Request(NamedTuple):
    """What a causal language model with `attach` is asked for."""

    positions: Tensor  # [n] int64, row * length + column
    length: int  # columns of the token ids that `positions` counts in
    num_rows: int
    targets: Tensor | None  # [n] int64, or None for logits
    chunk: int
    way: str = "chunked"  # these four as in loss.HeadRequest
    by_position: bool = True
    factor: float | None = None
    room: Room | None = None


class Answer(NamedTuple):
    """What a causal language model returns to a HeadRequest."""

    result: Any  # of `head_forward`
    auxiliary: Tensor | None  # load-balancing loss of a mixture of experts, coefficient applied; None without one


def attach(model: Any, tail: Tail | None) -> Any:
    """Teach a causal language model (wrapped by PEFT or not) to answer requests; returns the Hugging Face model inside.

    Two instances get a new `forward`: the head's, and the causal model's, which goes from hidden states at the asked
    positions straight to the head, called as a module once. Called without `request` both behave as before.
    `tail`: what lies behind the head; None: it is not known, so logits come from the model's own forward.

    Raises:
        UserMistake: adapters lie on the head.
    """
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise UserMistake(
            "tuning.target names the model's output head, on which distft trains no adapters: leave it out of "
            "tuning.target (all-linear does), or use tuning=full."
        )
    own = causal.forward
    if tail is None or not isinstance(head, nn.Linear):
        causal.forward = types.MethodType(_forward_through_own(own), causal)
        return causal
    head.forward = types.MethodType(head_forward, head)  # type: ignore[method-assign]
    causal.forward = types.MethodType(_forward_to_head(own, head, tail), causal)
    return causal


def _forward_to_head(own: Callable[..., Any], head: nn.Module, tail: Tail) -> Callable[..., Any]:
    def forward(causal: Any, *arguments: Any, request: Request | None = None, **options: Any) -> Any:
        if request is None:
            return own(*arguments, **options)
        options = {name: value for name, value in options.items() if value is not None}  # PEFT passes labels=None, ...
        balanced = balances(causal)
        if balanced:
            options["output_router_logits"] = True
        outputs = causal.base_model(*arguments, **options)
        hidden = select(outputs.last_hidden_state, request)
        asked = HeadRequest(tail, request.targets, *request[4:])
        result = head(hidden, request=asked)
        return Answer(result, balance_loss(causal, outputs.router_logits, options) if balanced else None)

    return forward


def _forward_through_own(own: Callable[..., Any]) -> Callable[..., Any]:
    """The slower way: logits of asked positions from the model's own forward; of all positions if it cannot choose."""
    can_choose = "logits_to_keep" in inspect.signature(own).parameters

    def forward(causal: Any, *arguments: Any, request: Request | None = None, **options: Any) -> Any:
        if request is None:
            return own(*arguments, **options)
        mask = options.get("attention_mask")
        if balances(causal) and mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise UserMistake(
                "The load-balancing loss of this model's own forward cannot be had for packed rows: "
                "set data.packing=false, or output_router_logits=false in its config.json."
            )
        if request.num_rows == 1 and can_choose:
            outputs = own(*arguments, logits_to_keep=request.positions, **options)
            logits = outputs.logits[0]
        else:
            outputs = own(*arguments, **options)
            logits = select(outputs.logits, request)
        auxiliary = getattr(outputs, "aux_loss", None)
        if isinstance(auxiliary, Tensor):
            auxiliary = auxiliary * coefficient(causal)
        if request.targets is None:
            return Answer(logits.float(), None)
        nll = F.cross_entropy(logits.float(), request.targets, reduction="none")
        total = nll.sum()
        return Answer((total * (1 + total.detach() * 0), nll.detach()), auxiliary)

    return forward


def select(values: Tensor, request: Request) -> Tensor:
    """[rows, columns, size] at the asked positions: [n, size]. Columns that PEFT put before the tokens are skipped."""
    columns = values.shape[1]
    positions, length = request.positions, request.length
    if columns != length:
        positions = positions // length * columns + positions % length + (columns - length)
    return values.reshape(-1, values.shape[-1]).index_select(0, positions)


def balances(causal: Any) -> bool:
    """Whether the configuration asks for the load-balancing loss of a mixture of experts."""
    config = causal.config.get_text_config()
    return bool(getattr(config, "output_router_logits", False)) and coefficient(causal) != 0.0


def coefficient(causal: Any) -> float:
    return float(getattr(causal.config.get_text_config(), "router_aux_loss_coef", 0.0) or 0.0)


def balance_loss(causal: Any, router_logits: Any, options: dict[str, Any]) -> Tensor:
    """The load-balancing loss of the model's own module (Switch Transformers, Fedus et al. 2021) x its coefficient."""
    config = causal.config.get_text_config()
    function = sys.modules[type(causal).__module__].load_balancing_loss_func
    num_experts = first(causal, config, "num_experts", "num_local_experts")
    chosen = first(causal, config, "num_experts_per_tok", "num_experts_per_token", "top_k")
    mask = options.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None  # a packed row has no padding
    loss: Tensor = function(router_logits, num_experts, chosen, mask)
    return loss * coefficient(causal)


def first(causal: Any, config: Any, *names: str) -> int:
    for holder in (causal, config):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    raise AttributeError(f"{type(causal).__name__} has none of {', '.join(names)}")


def check_head(config: Any, trust_remote_code: bool = False) -> str:
    """Compare our logits and balance loss with the model's own on a small copy with random weights.

    Returns why they differ, or an empty string. The random weights are large, so that a missed softcap or scale shows.
    """
    small = miniature(config, trust_remote_code, num_experts=4)
    if small is None:
        return "no small copy could be made to check the head on"
    ids = torch.arange(FIRST_WORD, FIRST_WORD + 12)[None]
    causal: Any = small
    head, tail = causal.get_output_embeddings(), tail_of(config)
    before = [(module, vars(module).get("forward")) for module in (causal, head)]
    if not isinstance(head, nn.Linear):
        return "its head is not a plain linear layer"
    if causal.base_model is causal:
        return "its layers cannot be told from its head"
    try:
        attach(causal, tail)
        with torch.no_grad():
            expected = causal(input_ids=ids)
            request = Request(torch.tensor([0, 5, 11]), 12, 1, None, 2)
            answer = causal(input_ids=ids, request=request)
    except Exception as error:  # remote code may raise anything
        return f"{type(error).__name__}: {error}".split("\n")[0]
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward
    wanted = expected.logits[0, request.positions].float()
    if answer.result.shape != wanted.shape or not torch.allclose(answer.result, wanted, rtol=1e-4, atol=1e-4):
        return "it does more to its logits than scale and softcap them"
    if answer.auxiliary is not None:
        balance = expected.aux_loss * coefficient(causal)
        if not torch.allclose(answer.auxiliary, balance, rtol=1e-5):
            return "its load-balancing loss is another one"
    return ""
