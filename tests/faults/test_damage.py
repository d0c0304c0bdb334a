"""Damaged files: nothing that a disk or a hand has changed is used, the file is named, and the run falls back."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distft.checkpoint import layout, ranges, state
from distft.checkpoint.layout import FileRecord, Manifest
from distft.checkpoint.verify import verify_checkpoint
from distft.cli import main as command
from distft.errors import DONE, NEGATIVE_VERDICT, UserMistake
from distft.model.verify import verify_folder
from distft.weights.findings import Finding
from distft.world import World
from tests.faults.runs import Shop, final_weights

TRIAL = "200 random single-bit flips, truncations, a missing file, an edited manifest"
LENGTH = ("max_steps=6", "checkpoint.every=2", "checkpoint.keep=3")
ALONE = World(0, 1, 0, 0, 1, torch.device("cpu"))
NUM_FLIPS = 200


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.open(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def whole(shop: Shop) -> Path:
    """A LoRA run on FSDP2 with checkpoints of the steps 2, 4 and 6, and its final folder; nothing happened to it."""
    code, text = shop.run("whole", "strategy=fsdp", "tuning=lora", *LENGTH)
    assert code == DONE, text
    return shop.folder / "whole"


@contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """The file with other content, or gone, for a while."""
    before = path.read_bytes()
    try:
        path.unlink() if content is None else path.write_bytes(content)
        yield
    finally:
        path.write_bytes(before)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def chosen(run: Path) -> tuple[str, str]:
    """(checkpoint that a resumed run would take, what is said of those passed over)."""
    said: list[str] = []
    folder, _ = state.choose(run, ALONE, said.append)
    return folder.name, " ".join(said)


def wrong(findings: list[Finding]) -> str:
    return " ".join(finding.said for finding in findings if finding.passed is False)


@pytest.mark.trial(TRIAL)
def test_no_flipped_bit_of_a_checkpoint_is_used(whole: Path) -> None:
    newest = whole / "checkpoints" / "step-000006"
    assert chosen(whole) == ("step-000006", "")  # the control: nothing is wrong before
    pick = random.Random(7)
    files = sorted(newest.iterdir())
    assert {path.stat().st_size > 100_000 for path in files} == {True, False}  # of several sizes
    for number in range(NUM_FLIPS):
        path = files[number % len(files)]
        content = path.read_bytes()
        bit = pick.randrange(8 * len(content))
        with changed(path, flipped(content, bit)):
            taken, said = chosen(whole)
            assert (taken, str(path) in said) == ("step-000004", True), (path.name, bit, said)
    assert chosen(whole) == ("step-000006", "")


def flip_in_final(whole: Path, num_flips: int) -> None:
    final = whole / "final"
    assert wrong(verify_folder(final)) == ""
    pick = random.Random(11)
    files = sorted(final.iterdir())
    for number in range(num_flips):
        path = files[number % len(files)]
        content = path.read_bytes()
        bit = pick.randrange(8 * len(content))
        with changed(path, flipped(content, bit)):
            assert str(path) in wrong(verify_folder(final)), (path.name, bit)
    assert wrong(verify_folder(final)) == ""


@pytest.mark.trial(TRIAL)
def test_no_flipped_bit_of_a_final_folder_passes(whole: Path) -> None:
    flip_in_final(whole, 35)


@pytest.mark.trial(TRIAL)
@pytest.mark.thorough
def test_no_flipped_bit_of_a_final_folder_passes_200_times(whole: Path) -> None:
    flip_in_final(whole, NUM_FLIPS)


@pytest.mark.trial(TRIAL)
def test_truncated_longer_and_missing_files(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, final = whole / "checkpoints" / "step-000006", whole / "final"
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for cut in (None, b"", content[:7], content[: len(content) // 2], content[:-1], content + b"\0"):
            with changed(path, cut):
                taken, said = chosen(whole)
                assert taken == "step-000004", (path.name, cut and len(cut))
                # A step without its manifest is no checkpoint: it is passed over as what a killed save leaves.
                assert str(path) in said or (cut is None and path.name == layout.MANIFEST), said
                assert str(path) in wrong(verify_checkpoint(newest)), (path.name, cut and len(cut))
    for name in ("adapter_model.safetensors", "adapter_config.json", "distft.json"):
        content = (final / name).read_bytes()
        for cut in (b"", content[: len(content) // 2], content + b"\0"):
            with changed(final / name, cut):
                assert name in wrong(verify_folder(final)), (name, len(cut))
    with changed(newest / "rank-00000.safetensors", None):
        assert command(["verify", str(whole)]) == NEGATIVE_VERDICT
    said = capsys.readouterr().out
    assert "rank-00000.safetensors is missing" in said
    assert "step-000004: nothing wrong" in said


def rewritten(manifest: Manifest, **values: object) -> bytes:
    """A manifest that was changed by someone who knows how it carries its own hash."""
    return Manifest(**{**vars(manifest), **values}).text().encode()


@pytest.mark.trial(TRIAL)
def test_an_edited_manifest(whole: Path) -> None:
    newest = whole / "checkpoints" / "step-000006"
    path = newest / layout.MANIFEST
    text, manifest = path.read_text(), Manifest.read(newest)
    with changed(path, text.replace('"step": 6', '"step": 5').encode()):
        taken, said = chosen(whole)
        assert taken == "step-000004"
        assert f"{path} was changed since it was written" in said
    with changed(path, rewritten(manifest, step=5)):  # `latest` still knows the right one
        taken, said = chosen(whole)
        assert taken == "step-000004"
        assert "is not the one that" in said

    huge = {name: FileRecord(2**60, record.xxh3_128) for name, record in manifest.files.items()}
    outside = {"../../config.yaml": next(iter(manifest.files.values()))}
    forged = {
        "has": rewritten(manifest, files=huge),  # … bytes instead of 2^60
        "names other files": rewritten(manifest, files=outside),
        "of 1000000000000 ranks": rewritten(manifest, world_size=10**12),
        "do not make it up": rewritten(manifest, shapes={name: [2**30, 2**30] for name in manifest.shapes}),
        "is not that of a run": rewritten(manifest, state={"surprise": 1}),
    }
    pointer = whole / "checkpoints" / layout.LATEST
    with changed(pointer, b"{}"):  # a checkpoint from elsewhere brings no pointer, or one that fits
        for words, content in forged.items():
            with changed(path, content):
                assert words in (wrong(verify_checkpoint(newest)) or chosen(whole)[1]), words


@pytest.mark.trial(TRIAL)
def test_right_hashes_over_other_weights_do_not_pass(whole: Path, tmp_path: Path) -> None:
    """The control of the logits: what only they can tell, since someone has made every hash fit."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    newest = copy / "checkpoints" / "step-000006"
    (copy / "checkpoints" / layout.LATEST).unlink()
    assert wrong(verify_checkpoint(newest)) == ""
    file, manifest = newest / "rank-00000.safetensors", Manifest.read(newest)
    with torch.no_grad():
        negate(file)
    record = FileRecord(file.stat().st_size, ranges.hash_file(file))
    (newest / layout.MANIFEST).write_bytes(rewritten(manifest, files={file.name: record}))
    said = wrong(verify_checkpoint(newest))
    assert "not the model that was trained" in said or "do not do what they did in training" in said


def negate(file: Path) -> None:
    """Turn the sign of one matrix of each pair in a rank's file, in place."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    turned = {name: -tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    save_file(turned, file, metadata=metadata)


@pytest.mark.trial(TRIAL)
def test_no_checkpoint_is_sound(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    for file in copy.glob("checkpoints/*/rank-*.safetensors"):
        file.write_bytes(flipped(file.read_bytes(), 8 * file.stat().st_size // 2))
    with pytest.raises(UserMistake, match=r"no checkpoint of .* is sound.*rank-00000.*resume=never"):
        state.choose(copy, ALONE, lambda text: None)


def resume_past_damage(shop: Shop, whole: Path, words: tuple[str, ...], harm: Callable[[Path], None]) -> str:
    """A run that lost its end and whose newest checkpoint is harmed, resumed to its end. Returns what it said."""
    name = f"{whole.name}-again"
    again = shop.folder / name
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "final")
    shutil.rmtree(again / "checkpoints" / "step-000006")
    (again / "result.json").unlink()
    harm(again / "checkpoints" / "step-000004")
    code, text = shop.run(name, *words, *LENGTH)
    assert code == DONE, text
    assert final_weights(again) == final_weights(whole)
    return text


def flip_one(folder: Path) -> None:
    file = sorted(folder.glob("rank-*.safetensors"))[-1]
    file.write_bytes(flipped(file.read_bytes(), 8 * (file.stat().st_size - 1000)))


@pytest.mark.trial(TRIAL)
def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(shop: Shop, whole: Path) -> None:
    text = resume_past_damage(shop, whole, ("strategy=fsdp", "tuning=lora"), flip_one)
    assert "Checkpoint step-000004 is damaged and passed over" in text
    assert "step-000004/rank-00000.safetensors was changed since it was written" in text
    assert "Going on after step 2 of 6" in text


HARMS: dict[str, Callable[[Path], object]] = {
    "was changed since it was written": flip_one,
    "is missing": lambda folder: (folder / "rank-00001.safetensors").unlink(),
    "instead of": lambda folder: (folder / "rank-00000.safetensors").write_bytes(b"short"),
    "is not a checkpoint's manifest": lambda folder: (folder / layout.MANIFEST).write_text("{"),
}


@pytest.mark.trial(TRIAL)
@pytest.mark.thorough
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_two_ranks_go_on_past_every_kind_of_damage(strategy: str, tuning: str, shop: Shop) -> None:
    words = (f"strategy={strategy}", f"tuning={tuning}", "launch.ranks=2")
    name = f"{strategy}-{tuning}"
    code, text = shop.run(name, *words, *LENGTH)
    assert code == DONE, text
    for said, harm in HARMS.items():
        text = resume_past_damage(shop, shop.folder / name, words, lambda folder, harm=harm: harm(folder) and None)
        assert "Checkpoint step-000004 is damaged and passed over" in text
        assert said in text, text
        assert "Going on after step 2 of 6" in text


def test_a_manifest_carries_what_a_verification_needs(whole: Path) -> None:
    for step in ("step-000002", "step-000004", "step-000006"):
        proof = json.loads((whole / "checkpoints" / step / layout.MANIFEST).read_text())["state"]["proof"]
        assert len(proof["prompts"]) == 3
        assert wrong(verify_checkpoint(whole / "checkpoints" / step)) == ""
