"""Chat templates: which one a run uses, how a conversation is rendered, and which characters of it are trained."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.data.rows import Document, Unfit, is_text, trainable
from distft.errors import UserMistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + 'TURN_END' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + 'TURN_END' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


def settle_template(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> None:
    """Give the tokenizer the chat template that `data.chat_template` asks for: auto, chatml or a Jinja file.

    chatml: a turn ends with `<|im_end|>`, which becomes the stop token, or with the tokenizer's own where it has none.

    Raises:
        UserMistake: auto without a template of the tokenizer's own, a file that cannot be read, no stop token.
    """
    if chat_template == "auto":
        if not tokenizer.chat_template:
            raise UserMistake(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template (a base model has none). Set "
                "data.chat_template=chatml, or to the path of a Jinja file."
            )
        return
    if chat_template == "chatml":
        tokenizer.chat_template = chatml(tokenizer)
        return
    try:
        template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserMistake(
            f"data.chat_template={chat_template} cannot be read ({error}); it is auto, chatml or a Jinja file's path."
        ) from None
    check_syntax(template, chat_template)
    tokenizer.chat_template = template


def chatml(tokenizer: PreTrainedTokenizerFast) -> str:
    """ChatML with generation markers; sets the tokenizer's stop token to what ends its turns."""
    if TURN_END in tokenizer.get_vocab():
        end = TURN_END
        if tokenizer.eos_token != TURN_END:
            tokenizer.eos_token = TURN_END
    elif tokenizer.eos_token:
        end = tokenizer.eos_token
    else:
        raise UserMistake(
            "data.chat_template=chatml needs a stop token, but the tokenizer has neither <|im_end|> nor an eos_token. "
            "Set eos_token in the model's tokenizer_config.json."
        )
    # Where every document of this tokenizer begins with a token, its chats do too.
    begins = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    template = CHATML.replace("'TURN_END'", json.dumps(end, ensure_ascii=False))
    return "{{- bos_token -}}\n" + template if begins else template


def check_syntax(template: str, name: str) -> None:
    """Compile a template as serving does, in transformers' own environment.

    Raises:
        UserMistake: it is no Jinja.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[]], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise UserMistake(f"data.chat_template={name} is no template, line {error.lineno}: {error.message}.") from None
    except jinja2.TemplateError:
        return  # it compiles; that it refuses a chat without messages is its right


@dataclass(frozen=True)
class Rendered:
    """One text to tokenise, and the character spans of it that the model has to say."""

    text: str
    spans: tuple[Span, ...]


def only_text(message: dict[str, Any]) -> bool:
    """A role and a content, both text and no subclass of it, and nothing else: true of nearly every message."""
    return len(message) == 2 and type(message.get("role")) is str and type(message.get("content")) is str


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the words it may name; renders as transformers' `apply_chat_template` does."""

    template: str
    special_tokens: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
        """The template that serving takes."""
        special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return cls(tokenizer.get_chat_template(), tuple(sorted(special.items())))

    @property
    def has_markers(self) -> bool:
        return MARKERS.search(self.template) is not None

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), prompt: bool = False) -> str:
        """The text of a conversation; `prompt`: and the words after which the model is to answer.

        Raises:
            Unfit: the template refuses the conversation.
        """
        return self._render(messages, tools, prompt, marked=False)[0]

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any], prompt: bool, marked: bool
    ) -> tuple[str, list[Span]]:
        text, spans = self._fill_in(messages, tools, prompt, marked)
        if not text.isascii() and not is_text(text):  # in what the template writes of more than the messages
            raise Unfit("invalid UTF-8", "in the row as the chat template renders it")
        return text, spans

    def _fill_in(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any], prompt: bool, marked: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            render = getattr(chat_template_utils, "_render_with_assistant_indices", None)
            if render is not None and not tools and all(map(only_text, messages)):
                # What render_jinja_template does once it has made the messages plain, which these are.
                compiled = chat_template_utils._compile_jinja_template(self.template)
                text, marks = render(compiled, list(messages), None, None, prompt, **dict(self.special_tokens))
                return text, list(marks) if marked else []
            texts, spans = render_jinja_template(
                [list(messages)],
                tools=list(tools) or None,
                chat_template=self.template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **dict(self.special_tokens),
            )
        except Exception as error:  # a template is a program, and rows hold anything: it can fail in any way
            raise Unfit("the chat template refuses the row", f"{type(error).__name__}: {error}") from None
        return texts[0], [tuple(span) for span in spans[0]] if marked else []

    def trained_spans(self, document: Document, multi_turn: str) -> list[Rendered]:
        """Render a conversation and find what the model has to say in it.

        One text where every turn stands in the whole conversation just as the model said it (`multi_turn` auto or
        whole), else one text a turn, rendered as serving would have rendered it then.

        Raises:
            Unfit: no turn is trained, or the template gives no way to tell the turns.
        """
        turns = [index for index, trained in enumerate(document.trained) if trained]
        trainable(document, "sft")
        if multi_turn != "turns":
            whole = self._whole(document, turns)
            if whole is not None:
                return [whole]
            if multi_turn == "whole":
                raise Unfit("a turn is not rendered in the whole conversation as it was said", "data.multi_turn=whole")
        return [self._turn(document, index) for index in turns]

    def _whole(self, document: Document, turns: list[int]) -> Rendered | None:
        """All turns in one text, or None where a rendered beginning is not the beginning of the whole."""
        messages, tools = document.messages, document.tools
        last = len(messages) - 1
        text, marked = self._render(messages, tools, prompt=False, marked=self.has_markers)
        ends = []
        for index in turns:
            said = text if index == last else self.render(messages[: index + 1], tools)
            if not text.startswith(said):
                return None
            ends.append(len(said))
        if self.has_markers:
            assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if len(marked) != len(assistants):
                raise Unfit("the chat template marks another number of turns than the row has")
            spans = dict(zip(assistants, marked, strict=True))
            return Rendered(text, tuple(spans[index] for index in turns))
        starts = []
        for index in turns:
            before = self.render(messages[:index], tools, prompt=True)
            if not text.startswith(before):
                return None
            starts.append(len(before))
        return Rendered(text, tuple(zip(starts, ends, strict=True)))

    def _turn(self, document: Document, index: int) -> Rendered:
        """One turn as the last of its conversation."""
        messages, tools = document.messages[: index + 1], document.tools
        text, marked = self._render(messages, tools, prompt=False, marked=self.has_markers)
        if self.has_markers and marked:
            return Rendered(text, (marked[-1],))
        before = self.render(messages[:index], tools, prompt=True)
        if not text.startswith(before):
            raise Unfit(
                "the chat template's generation prompt is not how it renders an answer",
                "give data.chat_template=<a file with {% generation %} markers around what the model says>",
            )
        return Rendered(text, ((len(before), len(text)),))
