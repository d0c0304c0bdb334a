"""Supervised fine-tuning: the loss lies on what the assistant says, its stop token included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distft.config.schema import Run
from distft.data.encoder import NO_STOP, Encoded, Fast, Result, fit
from distft.data.rows import Document, Unfit
from distft.data.template import ChatTemplate, Rendered, Span
from distft.errors import UserMistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SftEncoder:
    """Conversations through the chat template to ids and trained spans."""

    tokenizer: Fast
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    stop_tokens: tuple[str, ...]
    sequence_length: int
    too_long: str
    multi_turn: str
    train_on: str

    def check(self, documents: Sequence[Document]) -> None:
        """Refuse a template whose turns end with no stop token, before the rest is read.

        Raises:
            UserMistake: no turn of these documents ends with a token at which generation stops, or nothing stops it.
        """
        if not self.stop_ids:
            raise UserMistake(
                "The tokenizer has no eos_token and the model's generation_config.json none either: generation would "
                "never stop. Set eos_token in tokenizer_config.json, or data.chat_template=chatml."
            )
        results = self.encode(documents)
        if results and all(result.unfit and result.unfit.reason == NO_STOP for result in results):
            rendered = self.template.trained_spans(documents[0], self.multi_turn)[0]
            start, end = rendered.spans[-1]
            raise UserMistake(
                f"The chat template ends the assistant's turns with {rendered.text[start:end][-24:]!r}, which is none "
                f"of the tokens at which generation stops ({', '.join(self.stop_tokens)}): the model would never learn "
                "to stop. Set data.chat_template=chatml, or make the template end a turn with the eos_token, "
                "or name the turn's last token as eos_token_id in the model's generation_config.json."
            )

    def encode(self, documents: Sequence[Document]) -> list[Result]:
        """Render, tokenise and cut; one result a document, in order."""
        rendered: list[list[Rendered] | Unfit] = []
        for document in documents:
            try:
                rendered.append(self.template.trained_spans(document, self.multi_turn))
            except Unfit as fault:
                rendered.append(fault)
        tokens = self.tokenizer.encode_rendered(
            [text for texts in rendered if not isinstance(texts, Unfit) for text in texts]
        )
        return [
            Result([], texts)
            if isinstance(texts, Unfit)
            else self._result(document, texts, list(islice(tokens, len(texts))))
            for document, texts in zip(documents, rendered, strict=True)
        ]

    def _result(
        self, document: Document, texts: list[Rendered], tokens: list[tuple[np.ndarray, list[Span], bool]]
    ) -> Result:
        notes = {"a token lies across a turn's start"} if any(across for _, _, across in tokens) else set()
        if len(texts) > 1 or (self.multi_turn == "turns" and len(document.trained) > 2):
            notes.add("rows of one turn each")
        encoded = []
        for text, (ids, spans, _) in zip(texts, tokens, strict=True):
            try:
                trained = [
                    self.end_with_stop(ids, span, text, chars) for span, chars in zip(spans, text.spans, strict=True)
                ]
            except Unfit as fault:
                return Result([], fault)
            if self.train_on == "all":
                trained = [(0, len(ids))]
            encoded.append(Encoded(ids, trained))
        result = fit(encoded, self.sequence_length, self.too_long)
        return Result(result.documents, result.unfit, tuple(sorted({*notes, *result.notes}))) if notes else result

    def end_with_stop(self, ids: np.ndarray, span: Span, text: Rendered, chars: Span) -> Span:
        """The span up to and with its stop token: white space after it is the template's, not the model's.

        A marker that ends just before the stop token is taken to mean it too.

        Raises:
            Unfit: the turn does not end with a token at which generation stops.
        """
        start, end = span
        ended = end > start and int(ids[end - 1]) in self.stop_ids
        if not ended and end < len(ids) and int(ids[end]) in self.stop_ids:
            return start, end + 1
        for index in range(end - 1, start - 1, -1):
            if int(ids[index]) in self.stop_ids:
                return start, index + 1
            if self.tokenizer.backend.decode([int(ids[index])], skip_special_tokens=False).strip():
                break
        raise Unfit(NO_STOP, repr(text.text[chars[0] : chars[1]][-24:]))


def make_encoder(run: Run, tokenizer: PreTrainedTokenizerFast, folder: Path) -> SftEncoder:
    """The encoder of a run; `folder` holds the tokenizer with its template settled."""
    from distft.model.decode import stop_ids  # not above: processes that tokenise need no torch

    stops = stop_ids(tokenizer, Path(tokenizer.name_or_path))
    return SftEncoder(
        tokenizer=Fast(str(folder / "tokenizer.json")),
        template=ChatTemplate.of(tokenizer),
        stop_ids=tuple(stops),
        stop_tokens=tuple(str(token) for token in tokenizer.convert_ids_to_tokens(stops)),
        sequence_length=run.data.sequence_length,
        too_long="truncate" if run.data.too_long == "auto" else run.data.too_long,
        multi_turn=run.data.multi_turn,
        train_on=run.data.train_on,
    )
