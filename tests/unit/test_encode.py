"""What is trained is what the model has to say, in the tokens of serving; the cache gives it back or says why not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.config.schema import Run, Source
from distft.data import formats, tokenise
from distft.data.cache import TOKENS, EncodedSource, PreparedData, TokenFile, held_out_rows, open_prepared
from distft.data.encode import prepare, settle_template, tokenised
from distft.data.encoder import NO_STOP, NONE_TRAINED, TOO_LONG, Encoded, Fast, Result
from distft.data.formats import Block
from distft.data.rows import Columns, Document
from distft.data.sources import sources_of
from distft.data.template import CHATML, MARKERS, ChatTemplate
from distft.data.tokenise import encoded_blocks
from distft.errors import UserMistake
from distft.objective import make_encoder
from distft.objective.lm import LmEncoder
from distft.objective.sft import SftEncoder
from tests.unit.some_data import a_run, byte_level, prepared, questions, space_first, write_jsonl

UNMARKED = MARKERS.sub("", CHATML.replace("'TURN_END'", "'<|im_end|>'")).replace("{%- endgeneration -%}", "")
REASONING = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' and loop.last %}<think>{{ message['reasoning_content'] }}</think>{% endif -%}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ANSWERS = [
    "four",
    " four",
    "\nfour",
    "\n\n\nfour",
    "four\n\n",
    "Größe 😀 日本",
    "<b>",
    "assistant",
    "\u00a0x",
    "a\r\nb",
    "\ttab",
]


def chat(*turns: str, **extra: Any) -> Document:
    """A conversation that begins with the user."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    for message in messages[1::2]:
        message |= extra
    return Columns().document({"messages": messages})


def sft(tokenizer: Any, folder: Path, **data: Any) -> SftEncoder:
    tokenizer.save_pretrained(folder)
    encoder = make_encoder(a_run(folder, **data), tokenizer, folder)
    assert isinstance(encoder, SftEncoder)
    return encoder


def lm(tokenizer: Any, folder: Path, **data: Any) -> LmEncoder:
    tokenizer.save_pretrained(folder)
    run = a_run(folder, **data)
    run.objective.name = "lm"
    encoder = make_encoder(run, tokenizer, folder)
    assert isinstance(encoder, LmEncoder)
    return encoder


def only(results: list[Result]) -> Encoded:
    """The one document of the one row."""
    assert len(results) == 1
    assert results[0].unfit is None, results[0].unfit
    assert len(results[0].documents) == 1
    return results[0].documents[0]


def reason(results: list[Result]) -> str:
    assert len(results) == 1
    assert results[0].unfit is not None
    return results[0].unfit.reason


# --- spans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, UNMARKED], ids=["markers", "prefixes"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_prompt_and_answer_are_the_tokens_of_serving(tmp_path: Path, template: str | None, answer: str) -> None:
    tokenizer = byte_level(**({"chat_template": template} if template else {}))
    document = only(sft(tokenizer, tmp_path).encode([chat("What?", answer)]))
    serving = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What?"}], add_generation_prompt=True, return_dict=False
    )
    start, end = document.spans[0]
    assert document.ids[:start].tolist() == serving
    assert tokenizer.decode(document.ids[start:end]) == answer + "<|im_end|>"
    assert document.ids[end - 1] == tokenizer.eos_token_id
    assert tokenizer.decode(document.ids[end:]) == "\n"
    assert len(document.spans) == 1
    assert document.supervised == end - start


def test_the_whole_text_alone_would_join_prompt_and_answer(tmp_path: Path) -> None:
    """The negative control of the test above: its tokenizer does have a token across the border."""
    tokenizer = byte_level()
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "\n\n\nfour"}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] != prompt


def test_a_tokenizer_that_puts_a_space_first(tmp_path: Path) -> None:
    tokenizer = space_first()
    tokenizer.chat_template = LLAMA2
    encoder = sft(tokenizer, tmp_path)
    assert not encoder.tokenizer.joins
    document = only(encoder.encode([chat("What is two?", "It is four.")]))
    start, end = document.spans[0]
    assert tokenizer.decode(document.ids[start:end]).strip() == "It is four. </s>"
    assert document.ids[0] == tokenizer.bos_token_id
    assert document.ids[end - 1] == tokenizer.eos_token_id
    assert Fast(str(_saved(byte_level(), tmp_path / "bytes"))).joins


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder / "tokenizer.json"


def test_markers_and_prefixes_agree_over_many_turns(tmp_path: Path) -> None:
    documents = [chat("a", "b", "c", "d " * 9, "e", "f"), chat("a", "b", "c"), chat("q", "\n\nx", "y", "\nz")]
    marked = sft(byte_level(), tmp_path / "a").encode(documents)
    unmarked = sft(byte_level(chat_template=UNMARKED), tmp_path / "b").encode(documents)
    for one, other in zip(marked, unmarked, strict=True):
        assert np.array_equal(one.documents[0].ids, other.documents[0].ids)
        assert list(one.documents[0].spans) == list(other.documents[0].spans)
    assert [len(result.documents[0].spans) for result in marked] == [3, 1, 2]


def test_a_template_that_drops_earlier_reasoning_makes_a_row_of_every_turn(tmp_path: Path) -> None:
    tokenizer = byte_level(chat_template=REASONING)
    document = chat("one", "two", "three", "four", reasoning_content="hm")
    (result,) = sft(tokenizer, tmp_path).encode([document])
    assert result.notes == ("rows of one turn each",)
    for index, part in zip((1, 3), result.documents, strict=True):
        messages = list(document.messages)
        prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, return_dict=False)
        start, end = part.spans[0]
        assert part.ids[:start].tolist() == prompt
        assert tokenizer.decode(part.ids[start:end]) == f"<think>hm</think>{messages[index]['content']}<|im_end|>"
    (refused,) = sft(tokenizer, tmp_path, multi_turn="whole").encode([document])
    assert refused.unfit is not None
    single = sft(tokenizer, tmp_path).encode([chat("one", "two", reasoning_content="hm")])
    assert only(single)
    assert single[0].notes == ()


def test_turns_by_choice_and_turns_without_weight(tmp_path: Path) -> None:
    document = chat("a", "b", "c", "d")
    (result,) = sft(byte_level(), tmp_path, multi_turn="turns").encode([document])
    assert [len(part.spans) for part in result.documents] == [1, 1]
    silent = dataclasses.replace(document, trained=(False, False, False, True))
    for template in (None, UNMARKED):
        tokenizer = byte_level(**({"chat_template": template} if template else {}))
        part = only(sft(tokenizer, tmp_path).encode([silent]))
        assert tokenizer.decode(part.ids[part.trained]) == "d<|im_end|>"
    assert (
        reason(sft(byte_level(), tmp_path).encode([dataclasses.replace(document, trained=(False,) * 4)]))
        == "no assistant turn"
    )


def test_everything_can_be_trained(tmp_path: Path) -> None:
    part = only(sft(byte_level(), tmp_path, train_on="all").encode([chat("a", "b")]))
    assert part.supervised == len(part.ids) - 1


# --- the stop token ---------------------------------------------------------------------------------------------------


def test_a_marker_that_leaves_the_stop_token_out_is_taken_to_mean_it(tmp_path: Path) -> None:
    short = CHATML.replace("message['content'] + 'TURN_END' -}}{%- endgen", "message['content'] -}}{%- endgen")
    short = short.replace("{%- endgeneration -%}", "{%- endgeneration -%}{{- '<|im_end|>' -}}").replace(
        "TURN_END", "<|im_end|>"
    )
    expected = only(sft(byte_level(), tmp_path).encode([chat("a", "b")]))
    found = only(sft(byte_level(chat_template=short), tmp_path).encode([chat("a", "b")]))
    assert found.ids.tolist() == expected.ids.tolist()
    assert list(found.spans) == list(expected.spans)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", UNMARKED]
)
def test_a_stop_token_that_is_never_trained_is_refused(tmp_path: Path, template: str) -> None:
    tokenizer = byte_level(chat_template=template, eos_token="<|endoftext|>")
    encoder = sft(tokenizer, tmp_path)
    assert reason(encoder.encode([chat("a", "b")])) == NO_STOP
    with pytest.raises(UserMistake, match=r"data.chat_template=chatml") as mistake:
        encoder.check([chat("a", "b")])
    assert "<|endoftext|>" in str(mistake.value)
    encoder = sft(byte_level(), tmp_path)
    encoder.check([chat("a", "b")])


def test_stop_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tokenizer = byte_level(chat_template=UNMARKED, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(model)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    tokenizer.name_or_path = str(model)
    part = only(sft(tokenizer, tmp_path).encode([chat("a", "b")]))
    assert tokenizer.decode(part.ids[part.trained]) == "b<|im_end|>"


def test_a_row_cut_by_its_length_needs_no_stop_token(tmp_path: Path) -> None:
    (result,) = sft(byte_level(), tmp_path, sequence_length=32).encode([chat("a", "word " * 60)])
    assert len(result.documents[0].ids) == 32
    assert result.notes == ("truncated",)


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_base_model_needs_a_template_by_name() -> None:
    tokenizer = byte_level(chat_template=None)
    with pytest.raises(UserMistake, match=r"data\.chat_template=chatml"):
        settle_template(tokenizer, "auto")
    settle_template(tokenizer, "chatml")
    assert MARKERS.search(tokenizer.chat_template)
    tokenizer.eos_token = "<|endoftext|>"
    settle_template(tokenizer, "chatml")
    assert tokenizer.eos_token == "<|im_end|>"


def test_chatml_ends_turns_with_the_tokenizers_own_stop_token_where_it_has_no_other(tmp_path: Path) -> None:
    tokenizer = space_first()
    settle_template(tokenizer, "chatml")
    part = only(sft(tokenizer, tmp_path).encode([chat("What?", "four")]))
    assert tokenizer.decode(part.ids[part.trained]).endswith("four</s>")
    tokenizer = space_first()
    tokenizer.eos_token = None
    with pytest.raises(UserMistake, match="needs a stop token"):
        settle_template(tokenizer, "chatml")


def test_a_template_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(UNMARKED)
    tokenizer = byte_level()
    settle_template(tokenizer, str(file))
    assert tokenizer.chat_template == UNMARKED
    file.write_text("{% if %}")
    with pytest.raises(UserMistake, match="line 1"):
        settle_template(tokenizer, str(file))
    with pytest.raises(UserMistake, match="cannot be read"):
        settle_template(tokenizer, str(tmp_path / "none.jinja"))


def test_a_conversation_that_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = byte_level(
        chat_template="{% if messages|length > 2 %}{{ raise_exception('two turns') }}{% endif %}" + UNMARKED
    )
    results = sft(tokenizer, tmp_path).encode([chat("a", "b"), chat("a", "b", "c", "d"), chat("a", "c")])
    assert [result.unfit.reason if result.unfit else "" for result in results] == [
        "",
        "the chat template refuses the row",
        "",
    ]


# --- length -----------------------------------------------------------------------------------------------------------


def test_rows_that_are_too_long(tmp_path: Path) -> None:
    long, short = chat("a", "word " * 60), chat("b", "c")
    tokenizer = byte_level()
    full = only(sft(tokenizer, tmp_path, sequence_length=1024).encode([long]))
    encoder = sft(tokenizer, tmp_path, sequence_length=50)
    assert only(encoder.encode([long])).ids.tolist() == full.ids[:50].tolist()
    (split,) = dataclasses.replace(encoder, too_long="split").encode([long])
    assert np.concatenate([part.ids for part in split.documents]).tolist() == full.ids.tolist()
    assert np.concatenate([part.trained for part in split.documents]).tolist() == full.trained.tolist()
    (dropped,) = dataclasses.replace(encoder, too_long="drop").encode([long])
    assert (dropped.documents, dropped.unfit, dropped.notes) == ([], None, ("dropped as too long",))
    assert reason(dataclasses.replace(encoder, too_long="refuse").encode([long])) == TOO_LONG
    assert reason(encoder.encode([chat("word " * 60, "answer")])) == NONE_TRAINED
    assert only(dataclasses.replace(encoder, too_long="refuse").encode([short]))


def test_text_is_trained_to_its_end(tmp_path: Path) -> None:
    tokenizer = byte_level()
    encoder = lm(tokenizer, tmp_path, sequence_length=20)
    text = "What is two plus two? It is four. " * 9
    (result,) = encoder.encode([Document(text=text)])
    ids = np.concatenate([part.ids for part in result.documents])
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert all(part.supervised == len(part.ids) - 1 for part in result.documents)
    for length in range(18, 45):  # no piece is a single token, whatever the rest
        (result,) = encoder.encode([Document(text="8" * length)])
        assert all(2 <= len(part.ids) <= 20 for part in result.documents)
        assert sum(len(part.ids) for part in result.documents) == length + 1


def test_text_begins_as_the_tokenizer_begins_it_and_chats_as_the_template_does(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    encoder = lm(tokenizer, tmp_path)
    text, conversation = encoder.encode([Document(text="four"), chat("a", "b")])
    assert text.documents[0].ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(conversation.documents[0].ids).count("<|endoftext|>") == 0
    assert tokenizer.decode(conversation.documents[0].ids).endswith("b<|im_end|>")
    plain = dataclasses.replace(encoder, template=None)
    assert tokenizer.decode(only(plain.encode([chat("a", "b")])).ids) == "<|endoftext|>a\nb<|im_end|>"
    settle_template(tokenizer, "chatml")
    assert only(sft(tokenizer, tmp_path).encode([chat("a", "b")])).ids[0] == tokenizer.bos_token_id


# --- preparing --------------------------------------------------------------------------------------------------------


def same(one: PreparedData, other: PreparedData) -> bool:
    pairs = zip([*one.train, *one.eval], [*other.train, *other.eval], strict=True)
    return all(
        a.lengths.tolist() == b.lengths.tolist()
        and all(a.row(index)[0].tolist() == b.row(index)[0].tolist() for index in range(len(a.lengths)))
        and all(a.row(index)[1].tolist() == b.row(index)[1].tolist() for index in range(len(a.lengths)))
        for a, b in pairs
    )


def a_source(folder: Path, rows: list[Any], **data: Any) -> Run:
    return a_run(folder / "cache", path=write_jsonl(folder / "rows.jsonl", rows), **data)


def test_prepared_data_is_what_the_encoder_makes(tmp_path: Path) -> None:
    tokenizer = byte_level()
    found = prepared(a_source(tmp_path, questions(60)), tokenizer, tmp_path)
    encoder = sft(tokenizer, tmp_path)
    assert sum(len(side[0].lengths) for side in (found.train, found.eval)) == 60
    for source in (*found.train, *found.eval):
        for index in range(len(source.lengths)):
            row = questions(60)[int(source.row_id(index)) - 1]
            expected = only(encoder.encode([Columns().document(row)]))
            ids, trained = source.row(index)
            assert ids.tolist() == expected.ids.tolist()
            assert trained.tolist() == expected.trained.tolist()
            assert source.lengths[index] == len(ids)
            assert source.supervised[index] == expected.supervised
    again = open_prepared(found.path)
    assert same(found, again)
    assert again.hash == found.hash
    assert ids.base is not None  # a view of the mapped file, not a copy


def test_several_processes_make_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "SMALL", 0)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1 << 12)  # many, so that not all are made before processes have started
    rows: list[Any] = [*questions(1500), b"broken", *questions(1400)]
    one = prepared(a_source(tmp_path, rows), byte_level(), tmp_path)
    rejected = (tmp_path / "rejected.jsonl").read_text()
    shutil.rmtree(tmp_path / "cache")
    other = prepared(a_source(tmp_path, rows, workers=2), byte_level(), tmp_path)
    assert same(one, other)
    assert (tmp_path / "rejected.jsonl").read_text() == rejected
    assert json.loads(rejected)["number"] == 1501
    files = [next(run.path.parent.glob(f"*/{TOKENS}")) for run in (one, other)]
    assert files[0] == files[1]


def test_a_hit_and_a_miss_say_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(**changes: Any) -> str:
        tokenizer = byte_level(**changes.pop("tokenizer", {}))
        prepared(a_source(tmp_path, changes.pop("rows", questions(30)), **changes), tokenizer, tmp_path)
        return capfd.readouterr().err

    assert "rows: tokenised for the first time" in said()
    assert "rows: 30 rows found tokenised" in said()
    assert "rows: 30 rows found tokenised" in said(eval_fraction=0.2, max_rejected=0.5)
    assert "anew, changed since" in (told := said(rows=questions(31)))
    assert told.strip().endswith(": data")
    assert said(rows=questions(31), sequence_length=64).strip().endswith(": sequence_length")
    assert said(rows=questions(31), tokenizer={"chat_template": UNMARKED}).strip().endswith("sequence_length, template")
    assert "data.columns" in said(rows=questions(31), columns={"user": "{{question}}", "assistant": "{{answer}}"})


def test_a_damaged_cache_is_noticed_and_made_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = a_source(tmp_path, questions(50))
    first = prepared(run, byte_level(), tmp_path)
    (file,) = first.path.parent.glob(f"*/{TOKENS}")
    good = file.read_bytes()

    def replace(content: bytes) -> None:
        file.unlink()  # the old file stays mapped where it is still open
        file.write_bytes(content)

    def cut() -> None:
        replace(good[: len(good) // 2])

    def flip() -> None:
        replace(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])

    for damage, message in ((cut, "is cut short"), (flip, "has changed on disk"), (file.unlink, "cannot be read")):
        damage()
        capfd.readouterr()
        again = prepared(run, byte_level(), tmp_path)
        assert message in capfd.readouterr().err
        assert file.read_bytes() == good
        assert same(first, again)
    shutil.rmtree(file.parent)
    with pytest.raises(UserMistake, match="is gone; run the same command again"):
        open_prepared(first.path)
    assert not list(first.path.parent.glob("tmp-*"))


def test_bad_rows_are_counted_listed_and_limited(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = questions(200)
    rows[10], rows[20], rows[150] = b"{broken", {"question": "q", "answer": ""}, b"also broken"
    found = prepared(a_source(tmp_path, rows, max_rejected=0.02), byte_level(), tmp_path)
    assert found.reports[0]["rows"] == 197
    assert found.reports[0]["rejected"] == {"broken JSON": 2, "empty": 1}
    listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(row["number"], row["reason"], row["source"]) for row in listed] == [
        (11, "broken JSON", "rows"),
        (21, "empty", "rows"),
        (151, "broken JSON", "rows"),
    ]
    assert "3 of 200 rows of rows cannot be used: 2 broken JSON (line 11, 151" in capfd.readouterr().err
    with pytest.raises(UserMistake, match=r"2 broken JSON \(line 11, 151.*1 empty \(line 21.*data.max_rejected=0.01"):
        prepared(a_source(tmp_path, rows), byte_level(), tmp_path)
    prepared(a_source(tmp_path, questions(5)), byte_level(), tmp_path)
    assert not (tmp_path / "rejected.jsonl").exists()


def test_a_template_without_stop_is_told_before_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level(chat_template=UNMARKED, eos_token="<|endoftext|>")
    monkeypatch.setattr(tokenise, "encode_block", None)  # reading on would fail
    with pytest.raises(UserMistake, match="would never learn to stop"):
        prepared(a_source(tmp_path, questions(50)), tokenizer, tmp_path)


def test_evaluation_rows_stay_where_they_are_when_data_grows(tmp_path: Path) -> None:
    rows = [*questions(100), *questions(100)]  # every row twice

    def held(count: int) -> set[str]:
        found = prepared(a_source(tmp_path, rows[:count], eval_fraction=0.2), byte_level(), tmp_path)
        texts = [
            {str(source.row(index)[0].tolist()) for index in range(len(source.lengths))}
            for source in (*found.train, *found.eval)
        ]
        assert not texts[0] & texts[1]
        return texts[1]

    small, large = held(60), held(200)
    assert small < large
    assert 8 <= len(large) <= 35
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    assert abs(held_out_rows(hashes, 0.05).mean() - 0.05) < 0.01
    assert held_out_rows(hashes[:3], 1e-9).tolist() == (hashes[:3] == hashes[:3].min()).tolist()


def test_an_evaluation_file_is_read_whole(tmp_path: Path) -> None:
    run = a_source(tmp_path, questions(30), eval_path=write_jsonl(tmp_path / "test.jsonl", questions(40)[30:]))
    found = prepared(run, byte_level(), tmp_path)
    assert [(source.name, len(source.lengths)) for source in (*found.train, *found.eval)] == [
        ("rows", 30),
        ("test", 10),
    ]


def test_what_is_left_empty_is_told(tmp_path: Path) -> None:
    one = {"question": "q", "answer": "a"}
    with pytest.raises(UserMistake, match=r"data\.eval_fraction=0"):
        prepared(a_source(tmp_path, [one]), byte_level(), tmp_path)
    assert prepared(a_source(tmp_path, [one], eval_fraction=0), byte_level(), tmp_path).eval == []
    ids = tmp_path / "ids"
    ids.write_text("1\n")
    with pytest.raises(UserMistake, match="has no rows but those that exclude_ids leaves out"):
        prepared(a_source(tmp_path, [one], exclude_ids=str(ids)), byte_level(), tmp_path)
    ids.write_text("nobody\n")
    with pytest.raises(UserMistake, match=r"names no row of .*like 'nobody', those of the rows like '1'"):
        prepared(a_source(tmp_path, [one], exclude_ids=str(ids)), byte_level(), tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UserMistake, match="has no rows"):
        prepared(a_run(tmp_path, path=str(tmp_path / "rows.jsonl")), byte_level(), tmp_path)


def test_several_sources_keep_their_names_and_weights(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", questions(count)) for name, count in (("x", 20), ("y", 30))]
    sources = [Source(path=files[0], weight=1.0), Source(path=files[1], weight=2.0, name="z")]
    found = prepared(a_run(tmp_path, sources=sources, eval_fraction=0), byte_level(), tmp_path)
    assert [(source.name, source.weight, len(source.lengths)) for source in found.train] == [
        ("x", 1.0, 20),
        ("z", 2.0, 30),
    ]
    assert [report["name"] for report in found.reports] == ["x", "z"]


def test_the_file_reads_any_row_over_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.data import formats

    monkeypatch.setattr(formats, "BLOCK_BYTES", 200)
    run = a_source(tmp_path, questions(120))
    tokenizer = byte_level()
    encoder = sft(tokenizer, tmp_path)
    folder = tokenised(sources_of(run.data, "sft")[0], encoder, tmp_path / "cache", 1)
    tokens = TokenFile(folder / TOKENS)
    assert tokens.reader.num_record_batches > 3
    source = EncodedSource("rows", None, tokens, np.arange(120))
    assert [source.row_id(index) for index in range(120)] == [str(number) for number in range(1, 121)]
    for index in np.random.default_rng(0).permutation(120).tolist():
        expected = only(encoder.encode([Columns().document(questions(120)[index])]))
        assert source.row(index)[0].tolist() == expected.ids.tolist()


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    class Slow:
        is_fast, name_or_path = False, "some/model"

    with pytest.raises(UserMistake, match="is no fast one"):
        prepare(a_run(tmp_path), Slow(), tmp_path, tmp_path, make_encoder)  # type: ignore[arg-type]


def test_refusing_long_rows_stops_the_run(tmp_path: Path) -> None:
    rows = [*questions(400), {"question": "long", "answer": "word " * 300}]  # far fewer than data.max_rejected
    with pytest.raises(
        UserMistake, match=r"1 rows of rows are longer than data.sequence_length, the first of them line 401"
    ):
        prepared(a_source(tmp_path, rows, too_long="refuse"), byte_level(), tmp_path)
    assert prepared(a_source(tmp_path, rows, too_long="drop"), byte_level(), tmp_path).reports[0]["documents"] == 400


def test_rows_of_text_alone_render_as_all_others_do() -> None:
    tokenizer = byte_level()
    template = ChatTemplate.of(tokenizer)
    messages = [{"role": "user", "content": "Zwölf?"}, {"role": "assistant", "content": "Twelve.\n"}]
    plain = Document(tuple(messages), (False, True))
    rich = Document(tuple({**message, "unused": 1} for message in messages), (False, True))  # transformers' own way
    assert template.trained_spans(plain, "auto") == template.trained_spans(rich, "auto")
    assert template.render(messages, prompt=True) == template.render(rich.messages, prompt=True)
    assert template.render(messages) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_few_blocks_are_held_however_many_there_are(tmp_path: Path, num_workers: int) -> None:
    rows = "".join(json.dumps({"question": "What?", "answer": f"It is {n}." + " " * 2000}) + "\n" for n in range(3000))
    (tmp_path / "rows.jsonl").write_text(rows)
    run = a_run(tmp_path / "cache", path=str(tmp_path / "rows.jsonl"), format="jsonl")
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    spec = sources_of(run.data, "sft")[0]
    read = 0
    blocks = spec.blocks

    def counted() -> Iterator[Block]:
        nonlocal read
        for block in blocks():
            read += 1
            yield block

    object.__setattr__(spec, "blocks", counted)
    encoded = encoded_blocks(spec, make_encoder(run, tokenizer, tmp_path / "tokenizer"), num_workers)
    most = 1 if num_workers == 1 else 2 * num_workers + 1
    taken = 0
    for _ in encoded:
        taken += 1
        assert read - taken < most
    assert taken == read > 3 * most
