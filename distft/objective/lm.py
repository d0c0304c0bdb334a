"""Language modelling: next-token prediction on raw text, every token trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distft.config.schema import Run
from distft.data.encoder import Encoded, Fast, Result, fit
from distft.data.rows import Document, Unfit
from distft.data.template import ChatTemplate
from distft.errors import UserMistake

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class LmEncoder:
    """Text to ids, the end-of-text token last. A chat is rendered by the template if there is one, else plain."""

    tokenizer: Fast
    template: ChatTemplate | None
    eos_id: int
    sequence_length: int
    too_long: str

    def check(self, documents: Sequence[Document]) -> None:
        """Nothing can be wrong with text that its rows do not tell one by one."""

    def encode(self, documents: Sequence[Document]) -> list[Result]:
        """Tokenise and cut; one result a document, in order."""
        texts: list[str | Unfit] = []
        for document in documents:
            try:
                texts.append(self._text(document))
            except Unfit as fault:
                texts.append(fault)
        plain = [text for text, document in zip(texts, documents, strict=True) if not self._is_chat(document)]
        chats = [text for text, document in zip(texts, documents, strict=True) if self._is_chat(document)]
        # A template writes a document's first token itself; raw text gets it from the tokenizer.
        plain_ids = iter(self._encode(plain, add_special_tokens=True))
        chat_ids = iter(self._encode(chats, add_special_tokens=False))
        results = []
        for text, document in zip(texts, documents, strict=True):
            ids = next(chat_ids if self._is_chat(document) else plain_ids)
            results.append(Result([], text) if isinstance(text, Unfit) else self._result(ids))
        return results

    def _is_chat(self, document: Document) -> bool:
        return self.template is not None and not document.text

    def _text(self, document: Document) -> str:
        if self.template is not None and not document.text:
            return self.template.render(document.messages, document.tools).rstrip("\n")
        return document.plain()

    def _encode(self, texts: Sequence[str | Unfit], add_special_tokens: bool) -> list[list[int]]:
        """Ids of the texts; of a row that is unfit, none."""
        encodings = self.tokenizer.backend.encode_batch_fast(
            ["" if isinstance(text, Unfit) else text for text in texts], add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def _result(self, ids: list[int]) -> Result:
        if not ids or ids[-1] != self.eos_id:
            ids = [*ids, self.eos_id]
        return fit([Encoded(np.asarray(ids, dtype=np.int32), [(0, len(ids))])], self.sequence_length, self.too_long)


def make_encoder(run: Run, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LmEncoder:
    """The encoder of a run; `folder` holds the tokenizer.

    Raises:
        UserMistake: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise UserMistake(
            "objective=lm ends every document with the tokenizer's eos_token, but it has none. Set eos_token in the "
            "model's tokenizer_config.json."
        )
    return LmEncoder(
        tokenizer=Fast(str(folder / "tokenizer.json")),
        template=ChatTemplate.of(tokenizer) if tokenizer.chat_template else None,
        eos_id=tokenizer.eos_token_id,
        sequence_length=run.data.sequence_length,
        too_long="split" if run.data.too_long == "auto" else run.data.too_long,
    )
