"""From texts with trained spans to token ids with trained spans; what every objective's encoder is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distft.config.schema import Run
from distft.data.rows import Document, Unfit
from distft.data.template import Rendered, Span

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

NO_STOP = "an assistant turn does not end with a stop token"
NONE_TRAINED = "no token is trained"
TOO_LONG = "longer than data.sequence_length"
NOTES = ("rows of one turn each", "truncated", "split", "dropped as too long", "a token lies across a turn's start")


@dataclass(frozen=True)
class Encoded:
    """One document as the model sees it. The first token is never a target, whatever the spans say."""

    ids: np.ndarray  # [length] int32
    spans: Sequence[Span]  # first trained token, first one after it; in order, apart from each other

    @property
    def supervised(self) -> int:
        """Targets: trained tokens but the first of the document."""
        total = 0
        for start, end in self.spans:
            total += max(0, end - (start or 1))
        return total

    @property
    def trained(self) -> np.ndarray:
        """[length] bool."""
        mask = np.zeros(len(self.ids), dtype=bool)
        for start, end in self.spans:
            mask[start:end] = True
        return mask


@dataclass
class Result:
    """What one row became: documents, or a reason for none; and what happened to it, to be counted."""

    documents: list[Encoded]
    unfit: Unfit | None = None
    notes: tuple[str, ...] = ()


class Encoder(Protocol):
    """How an objective makes token ids of documents: a frozen dataclass of plain values.

    It travels to other processes, and its fields are a part of the cache's key.
    """

    @property
    def tokenizer(self) -> Fast: ...

    def check(self, documents: Sequence[Document]) -> None:
        """Look at a source's first documents before the rest is read.

        Raises:
            UserMistake: nothing of this kind can be trained.
        """
        ...

    def encode(self, documents: Sequence[Document]) -> list[Result]:
        """Token ids of many documents, in order."""
        ...


MakeEncoder = Callable[[Run, "PreTrainedTokenizerFast", Path], Encoder]
"""From the run, its tokenizer, and the folder where that lies with its template settled."""


@dataclass(frozen=True)
class Fast:
    """A `tokenizers` tokenizer read from its file, without transformers' class around it."""

    file: str

    @cached_property
    def backend(self) -> Tokenizer:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(self.file)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def joins(self) -> bool:
        """Whether texts may be tokenised piece by piece: not where a piece's start gets a space put before it."""
        whole, front, back = self.backend.encode_batch(["user\nword", "user\n", "word"], add_special_tokens=False)
        return list(whole.ids) == front.ids + back.ids

    def __reduce__(self) -> tuple[Any, ...]:
        return Fast, (self.file,)

    def encode_rendered(self, texts: Sequence[Rendered]) -> Iterator[tuple[np.ndarray, list[Span], bool]]:
        """(ids, token spans, whether a token lay across a span's start) of each text.

        The spans' starts are token boundaries, as they are in serving, where the prompt is tokenised alone. Where the
        tokens of the whole text do not keep to them, the text is tokenised piece by piece; where the tokenizer cannot
        do that either (SentencePiece with a space put first), the span begins at the next token.
        """
        encodings = self.backend.encode_batch([text.text for text in texts], add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            spans = [_token_span(encoding, start, end, len(text.text)) for start, end in text.spans]
            across = any(
                _begin(encoding, first, start) != start
                for (first, _), (start, _) in zip(spans, text.spans, strict=True)
            )
            if across and self.joins:
                ids, spans = self._pieces(text)
                yield ids, spans, False
            elif across:
                yield np.asarray(encoding.ids, dtype=np.int32), _begin_after(encoding, spans, text.spans), True
            else:
                yield np.asarray(encoding.ids, dtype=np.int32), spans, False

    def _pieces(self, text: Rendered) -> tuple[np.ndarray, list[Span]]:
        cuts = sorted({0, len(text.text), *(cut for span in text.spans for cut in span)})
        pieces = [text.text[start:end] for start, end in pairwise(cuts)]
        ids = [encoding.ids for encoding in self.backend.encode_batch(pieces, add_special_tokens=False)]
        at = dict(zip(cuts, np.cumsum([0, *map(len, ids)]).tolist(), strict=True))
        spans = [(at[start], at[end]) for start, end in text.spans]
        return np.concatenate([np.asarray(piece, dtype=np.int32) for piece in ids]), spans


def _token_span(encoding: Encoding, start: int, end: int, length: int) -> Span:
    """Tokens from the one that holds character `start` to before the one that holds character `end`."""
    return _token_at(encoding, start, length), _token_at(encoding, end, length)


def _begin_after(encoding: Encoding, spans: Sequence[Span], chars: Sequence[Span]) -> list[Span]:
    """Spans that leave out a token which begins before its span does."""
    return [
        (first + (_begin(encoding, first, start) < start), end)
        for (first, end), (start, _) in zip(spans, chars, strict=True)
    ]


def _begin(encoding: Encoding, token: int, otherwise: int) -> int:
    """The character at which a token begins."""
    place = encoding.token_to_chars(token) if token < len(encoding) else None
    return place[0] if place else otherwise


def _token_at(encoding: Encoding, character: int, length: int) -> int:
    """The first token at or after a character; the number of tokens where there is none."""
    while character < length:
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
        character += 1
    return len(encoding)


def cut_to_length(document: Encoded, length: int, too_long: str) -> tuple[list[Encoded], str]:
    """Apply `data.too_long` to one document: the documents that it becomes, and a note for the count.

    A truncated document that trains nothing any more, and pieces that never did, are left out.
    """
    if len(document.ids) <= length:
        return [document], ""
    if too_long == "truncate":
        cut = _slice(document, 0, length)
        return ([cut] if cut.supervised else []), "truncated"
    if too_long == "split":
        starts = list(range(0, len(document.ids), length))
        if len(document.ids) - starts[-1] == 1:  # a document of one token has no target: give it its neighbour
            starts[-1] -= 1
        pieces = [
            _slice(document, start, end) for start, end in zip(starts, [*starts[1:], len(document.ids)], strict=True)
        ]
        return [piece for piece in pieces if piece.supervised], "split"
    if too_long == "drop":
        return [], "dropped as too long"
    raise Unfit(TOO_LONG, f"{len(document.ids)} tokens")


def _slice(document: Encoded, start: int, end: int) -> Encoded:
    cut = [(max(first, start) - start, min(last, end) - start) for first, last in document.spans]
    return Encoded(document.ids[start:end], [span for span in cut if span[0] < span[1]])


def fit(documents: Sequence[Encoded], length: int, too_long: str) -> Result:
    """The result of one row whose documents are encoded in full."""
    if len(documents) == 1 and len(documents[0].ids) <= length and documents[0].supervised:
        return Result(list(documents))
    kept: list[Encoded] = []
    notes = set()
    try:
        for document in documents:
            if not document.supervised:
                continue
            pieces, note = cut_to_length(document, length, too_long)
            kept += pieces
            notes |= {note} if note else set()
    except Unfit as fault:
        return Result([], fault)
    if not kept and "dropped as too long" not in notes:
        detail = f"within data.sequence_length={length}" if "truncated" in notes else ""
        return Result([], Unfit(NONE_TRAINED, detail))
    return Result(kept, notes=tuple(sorted(notes)))
