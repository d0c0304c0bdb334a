"""`distft verify` on finished folders: each of its checks is seen to pass, and to fail on what it is there for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.cli import main as command
from distft.config.schema import Tuning
from distft.errors import DONE, NEGATIVE_VERDICT, USER_MISTAKE
from distft.model.probe import Probe, Recorded
from distft.model.proof import PROOF_FILE, Proof
from distft.model.verify import verify_folder
from distft.weights.findings import Finding, verdict
from tests.unit import folders
from tests.unit.test_final import LORA, Trained, rewrite

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The final folders of a full run and of a LoRA run; tests work on copies."""
    made = {}
    for name, chosen in {"full": Tuning(), "lora": LORA}.items():
        trained = Trained("llama", tmp_path_factory.mktemp(name), chosen)
        trained.save()
        made[name] = trained.folder
    return made


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def edit(name: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def outcome(findings: list[Finding], passed: bool | None) -> dict[str, str]:
    return {finding.what: finding.said for finding in findings if finding.passed is passed}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_was_saved_is_right(kind: str, saved: dict[str, Path]) -> None:
    findings = verify_folder(saved[kind])
    assert outcome(findings, False) == outcome(findings, None) == {}
    made = ["files", "weights", "names and shapes", "stop token", "tokenizer", "chat template", "logits"]
    made += ["adapter", "base"] if kind == "lora" else []
    assert {finding.what for finding in findings} == set(made)
    assert verdict(findings) == f"nothing wrong; {len(made)} of {len(made)} checks passed"


def put_a_pickle_beside(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def make_a_weight_nan(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).view(-1)[0] = torch.nan

    rewrite(folder, change)


def rename_a_weight(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(other=tensors.pop(sorted(tensors)[0])))


@pytest.mark.parametrize(
    ("kind", "change", "wrong", "named"),
    [
        ("full", edit("generation_config.json", eos_token_id=7), "stop token", "when it was saved, at [1]"),
        ("full", edit("tokenizer_config.json", eos_token="<pad>"), "tokenizer", "not those that were saved"),
        ("full", lambda f: (f / "chat_template.jinja").write_text("{{ x }}"), "chat template", "not the one saved"),
        ("full", put_a_pickle_beside, "files", "pytorch_model.bin was not saved with the folder"),
        ("full", lambda f: (f / "tokenizer.json").unlink(), "files", "tokenizer.json is missing"),
        ("full", lambda f: (f / "model.safetensors").unlink(), "files", "no safetensors weights"),
        ("full", edit("config.json", vocab_size=64), "names and shapes", "do not belong together"),
        ("full", make_a_weight_nan, "weights", "no numbers"),
        ("full", rename_a_weight, "names and shapes", "lacks 1 of the"),
        ("lora", rename_a_weight, "names and shapes", "belongs to another base"),
        ("lora", edit("adapter_config.json", lora_alpha=3), "logits", "not the model that was trained"),
        ("lora", edit("adapter_config.json", base_model_name_or_path="/gone"), "names and shapes", "which is gone"),
        (
            "lora",
            lambda f: rewrite(f, lambda tensors: [tensor.zero_() for tensor in tensors.values()]),
            "adapter",
            "it does nothing",
        ),
    ],
)  # fmt: skip
def test_each_fault_is_found_by_its_check(
    kind: str, change: Change, wrong: str, named: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(saved[kind], tmp_path / "final")
    change(folder)
    if (proof := json.loads((folder / PROOF_FILE).read_text())) and wrong not in ("files", "adapter", "weights"):
        # The other checks must see it too, not the files' hashes alone: as if the folder had been saved so.
        kept = Proof(**{key: value for key, value in proof.items() if key != "xxh3_128"})
        files = {path.name: path for path in folder.iterdir() if path.name in kept.files}
        from distft.weights.write import hash_file

        records = {n: {"num_bytes": p.stat().st_size, "xxh3_128": hash_file(p)} for n, p in files.items()}
        (folder / PROOF_FILE).write_text(dataclasses.replace(kept, files=records).text())
    found = outcome(verify_folder(folder), False)
    assert named in found[wrong], found
    assert wrong == "files" or "files" not in found, found


def test_another_base_is_noticed(tmp_path: Path) -> None:
    trained = Trained("llama", tmp_path, LORA)
    trained.save()
    file = trained.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = outcome(verify_folder(trained.folder), False)
    assert f"{file} is not the file that it was trained on" in found["base"]


def test_what_does_not_fit_into_memory_is_left_out_and_said(saved: dict[str, Path]) -> None:
    findings = verify_folder(saved["lora"], max_bytes=10_000)
    assert outcome(findings, False) == {}
    left_out = outcome(findings, None)
    assert set(left_out) == {"logits"}
    assert "verify.max_memory allows 0.01 MiB" in left_out["logits"]


def test_the_command_ends_with_its_verdict(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved["full"].parent / "base"  # a model that was not saved by distft
    assert command(["verify", str(base)]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{base}: nothing wrong; 3 of 6 checks passed; left out: files, tokenizer, logits"
    assert any("no distft.json: it was not saved by distft" in line for line in lines)

    run = tmp_path / "run"
    run.mkdir()
    copied(saved["full"], run / "final")
    assert command(["verify", str(run), "verify.max_memory=0.5"]) == DONE
    assert "ok        logits" in capsys.readouterr().out
    data = bytearray((run / "final" / "model.safetensors").read_bytes())
    data[-1] ^= 4
    (run / "final" / "model.safetensors").write_bytes(data)
    assert command(["verify", str(run)]) == NEGATIVE_VERDICT
    said = capsys.readouterr().out
    assert f"WRONG     files: {run / 'final' / 'model.safetensors'} is not what was written" in said
    assert "final: wrong: files, weights;" in said
    assert "left out: logits" in said

    (tmp_path / "empty").mkdir()
    for words in (["verify", str(tmp_path / "empty")], ["verify", str(tmp_path / "none")], ["verify"]):
        assert command(words) == USER_MISTAKE
    assert command(["verify", str(run), "verify.max_memory=0"]) == USER_MISTAKE
    assert "verify.max_memory=0" in capsys.readouterr().err


def test_recorded_logits_come_back_as_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1000, generator=generator)
    rows = torch.tensor([[3, 4, 5], [6, 7, 7]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    probe = Probe(rows, mask, torch.tensor([0, 1, 2, 3, 4]), logits)
    recorded = Recorded.of(probe)
    assert recorded.values.shape == (5, 128)
    again = Recorded.of_json(json.loads(json.dumps(recorded.as_json())))
    for field in dataclasses.fields(Recorded):
        assert torch.equal(getattr(again, field.name), getattr(recorded, field.name)), field.name
    assert again.distance(logits) == 0
    assert again.distance(logits + 0.1 * torch.randn(5, 1000, generator=generator)) == pytest.approx(0.1, rel=0.1)
    assert again.distance(logits[:, :500]) == float("inf")


def test_plain_libraries_pass_over_the_proof(saved: dict[str, Path]) -> None:
    assert PROOF_FILE in {path.name for path in saved["full"].iterdir()}
    folders.plain(saved["full"])
