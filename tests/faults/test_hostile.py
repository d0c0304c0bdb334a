"""Models, adapters, checkpoints and configurations from elsewhere are data: refused with the reason, nothing executed.

Every attack here would make a file, the canary, if anything of it ran; where it is cheap the control lets it run once.
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.cli import main as command
from distft.config.schema import Run
from distft.config.schema.model import Model
from distft.errors import DONE, NEGATIVE_VERDICT, USER_MISTAKE, UserMistake
from distft.model.folder import read_tokenizer, resolve
from distft.model.plain import load_plain
from distft.weights.store import FolderWeights
from tests.faults.runs import ROOT, Shop
from tests.unit import folders
from tests.unit.test_final import LORA, Trained

TRIAL = (
    "a pickle in an adapter, `../` in an index, remote code, `_target_: os.system`, "
    "a shell metacharacter in a host name"
)
CPU = torch.device("cpu")
SECRETS = {
    "HF_TOKEN": "hf_" + "abcDEF1234" * 3,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "AWS_SECRET_ACCESS_KEY": "Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4",
    "MY_PASSWORD": "correct-horse-battery",
}


class Opens:
    """Unpickling it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def model_in(folder: Path, **config: Any) -> Path:
    """A sound model folder, with these entries in its configuration."""
    folders.save(folders.make_model("llama"), folder)
    folders.tokenizer().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def refused(folder: Path, trust: bool = False) -> str:
    """What training, generating and verifying say of a folder; all of them refuse it."""
    reasons = []
    run = Run(model=Model(name="hf", path=str(folder), trust_remote_code=trust))
    for use in (lambda: resolve(run, lambda: iter(())), lambda: load_plain(folder, "fp32", CPU, trust)):
        with pytest.raises(UserMistake) as caught:
            use()
        reasons.append(str(caught.value))
    assert command(["verify", str(folder)]) == NEGATIVE_VERDICT
    return " ".join(reasons)


@pytest.mark.trial(TRIAL)
def test_a_pickle_in_a_model_or_an_adapter(canary: Path, tmp_path: Path) -> None:
    attack = pickle.dumps({"lora_A": Opens(canary)})
    pickle.loads(attack)
    assert canary.exists()  # the control: it is a weapon
    canary.unlink()

    model = model_in(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(attack)
    assert "pytorch_model.bin, a pickle that could run any code" in refused(model)

    trained = Trained("llama", tmp_path, LORA)
    trained.save()
    load_plain(trained.folder, "fp32", CPU)
    (trained.folder / "adapter_model.safetensors").unlink()
    (trained.folder / "adapter_model.bin").write_bytes(attack)
    reason = "adapter_model.bin, a pickle that could run any code, and no adapter_model.safetensors. Convert it once"
    with pytest.raises(UserMistake, match=reason):
        load_plain(trained.folder, "fp32", CPU)
    assert command(["verify", str(trained.folder)]) == NEGATIVE_VERDICT
    assert command(["generate", str(trained.folder), "prompt=hi"]) == USER_MISTAKE
    assert not canary.exists()


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("outside", ["../stolen.safetensors", "{}/stolen.safetensors"], ids=["relative", "absolute"])
def test_an_index_that_leaves_its_folder(outside: str, tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    index = {"weight_map": dict.fromkeys(names, outside.format(tmp_path))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not a safetensors file of that folder. It is refused." in refused(folder)


@pytest.mark.trial(TRIAL)
def test_links(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model")
    secret = tmp_path / "credentials.json"
    secret.write_text('{"token": "x"}')
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(secret)
    assert f"is a link that leaves its folder, to {secret}" in refused(folder)

    # What the Hub's cache makes, and links within the folder, are taken.
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model_in(tmp_path / "plain").iterdir())):
        blob = blobs / f"{number:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (snapshot / "copy.json").symlink_to("config.json")
    load_plain(snapshot, "fp32", CPU)
    assert command(["verify", str(snapshot)]) == DONE


@pytest.mark.trial(TRIAL)
def test_code_of_a_model_is_not_run(canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "modules"), *sys.path])
    code = f"open({str(canary)!r}, 'w')\nfrom transformers import LlamaConfig\nclass Config(LlamaConfig):\n"
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    unknown = model_in(tmp_path / "unknown", model_type="evil", auto_map=classes)
    (unknown / "evil.py").write_text(code + "    model_type = 'evil'\n")
    assert "Read that code, then set model.trust_remote_code=true" in refused(unknown)
    assert not canary.exists()

    # A kind that transformers knows: its own class is taken, and the folder's code stays unread.
    known = model_in(tmp_path / "known", auto_map=classes)
    (known / "evil.py").write_text(code + "    model_type = 'llama'\n")
    tokenizer = known / "tokenizer_config.json"
    mapped = {**json.loads(tokenizer.read_text()), "auto_map": {"AutoTokenizer": [None, "evil.Config"]}}
    tokenizer.write_text(json.dumps(mapped))
    load_plain(known, "fp32", CPU)
    read_tokenizer(known, trust_remote_code=False)
    assert not canary.exists()

    with pytest.raises((UserMistake, Exception)):  # the control: trusted, it runs
        load_plain(unknown, "fp32", CPU, trust_remote_code=True)
    assert canary.exists()


@pytest.mark.trial(TRIAL)
def test_modules_and_kernels_named_by_a_configuration(canary: Path, tmp_path: Path) -> None:
    kernel = model_in(tmp_path / "kernel", attn_implementation="someone/attention")
    assert "attn_implementation=someone/attention is code that would be fetched and run" in refused(kernel)

    trained = Trained("llama", tmp_path, LORA)
    trained.save()
    (tmp_path / "weapon.py").write_text(f"open({str(canary)!r}, 'w')")
    path = trained.folder / "adapter_config.json"
    sound = json.loads(path.read_text())
    for entries, reason in (
        ({"megatron_config": {"a": 1}, "megatron_core": "weapon"}, "makes PEFT import the module 'weapon'"),
        ({"peft_type": "XLORA"}, "peft_type=XLORA is not read here"),
        ({"r": 2**40}, "claims LoRA rank 1099511627776, but the matrices of adapter_model.safetensors have rank 4"),
        ({"rank_pattern": {"q_proj": 2**40}}, "claims LoRA rank 1099511627776"),
        ({"layer_replication": [[0, 2**40]]}, "layer_replication"),
    ):
        path.write_text(json.dumps({**sound, **entries}))
        with pytest.raises(UserMistake) as caught:
            load_plain(trained.folder, "fp32", CPU)
        assert reason in str(caught.value)
    assert not canary.exists()
    path.write_text(json.dumps(sound))
    load_plain(trained.folder, "fp32", CPU)


def header_of(path: Path, header: dict[str, Any], data: bytes = b"\0" * 16, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.trial(TRIAL)
def test_sizes_are_believed_only_where_the_file_has_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sound = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    header_of(path, sound)
    assert FolderWeights(tmp_path).names() == ["a"]
    for header, length in (
        ({"a": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}}, None),
        ({"a": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 16]}}, None),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, None),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, None),
        ({**sound, "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, None),
        (sound, 2**60),
    ):
        header_of(path, header, length=length)
        with pytest.raises(UserMistake, match="damaged or incomplete"):
            FolderWeights(tmp_path)

    for entries, reason in (
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1,000,000,000, but its weight files hold 21 tensors"),
        ({"hidden_size": 2**50}, "hidden_size=1,125,899,906,842,624, but its weight files hold"),
        ({"vocab_size": 10_000}, "embeddings of vocab_size=10,000 times 32 are more than"),
        ({"max_position_embeddings": 2**60}, "no model knows more than"),
    ):
        folder = model_in(tmp_path / next(iter(entries)), **entries)
        before = psutil.Process().memory_info().rss
        assert reason in refused(folder)
        assert psutil.Process().memory_info().rss - before < 200 * 1024**2


TARGET = "data:\n  columns:\n    _target_: os.system\n    command: touch {}\n"


@pytest.mark.trial(TRIAL)
def test_python_named_by_a_configuration(canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "conf" / "experiment"
    mine.mkdir(parents=True)
    (mine / "evil.yaml").write_text("# @package _global_\n" + TARGET.format(canary))
    (tmp_path / "run").mkdir()
    snapshot = tmp_path / "run" / "config.yaml"
    snapshot.write_text("# A distft run, whole.\n" + TARGET.format(canary))
    for words in (
        ["train", "+data.columns._target_=os.system", f"run.dir={tmp_path / 'a'}"],
        ["train", f"--config-dir={tmp_path / 'conf'}", "experiment=evil", f"run.dir={tmp_path / 'b'}"],
        ["train", f"--config-dir={tmp_path / 'run'}", "--config-name=config", f"run.dir={tmp_path / 'c'}"],
        ["train", f"--snapshot={snapshot}"],
        ["preflight", str(snapshot)],
    ):
        assert command(words) == USER_MISTAKE, words
        said = capsys.readouterr().err
        assert "_target_" in said, said
        assert "Traceback" not in said
    assert not canary.exists()

    trusting = tmp_path / "conf" / "experiment" / "trusting.yaml"
    (mine / "evil.yaml").unlink()
    trusting.write_text("# @package _global_\nmodel:\n  name: hf\n  path: a/b\n  trust_remote_code: true\n")
    words = [f"--config-dir={tmp_path / 'conf'}", "experiment=trusting", "launch.dry_run=true", f"run.dir={tmp_path}/d"]
    assert command(["train", *words]) == USER_MISTAKE
    assert "add model.trust_remote_code=true to the command line" in capsys.readouterr().err
    assert command(["train", *words, "model.trust_remote_code=true"]) == DONE


def started(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    arguments = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, env=settings)


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("variable", ["SLURM_JOB_NODELIST", "MASTER_ADDR"])
def test_a_host_name_that_a_shell_would_run(variable: str, canary: Path, tmp_path: Path) -> None:
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    for name in (f"node1;touch {canary}", f"$(touch {canary})", "-oProxyCommand=touch"):
        ended = started(f"run.dir={tmp_path / 'run'}", **task, **{variable: name})
        assert ended.returncode == USER_MISTAKE, ended.stderr
        assert f"{name!r} is no host name" in ended.stderr
        assert "Traceback" not in ended.stderr
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.trial(TRIAL)
def test_the_commands_that_a_dry_run_prints(canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copied into a shell they start what they say and nothing else: the programs are replaced by `echo` here."""
    rows = Shop.open(tmp_path).folder / "rows.jsonl"
    folder = tmp_path / f"a b;touch {canary.name} $(touch {canary.name}) 'x'"
    fixed = ["data=jsonl", f"data.path={rows}", "launch.dry_run=true", "launch.ranks=2", "log=none"]
    from distft.launch.start import quoted

    for engine in ("direct", "torchrun"):
        assert command(["train", *fixed, f"launch.engine={engine}", f"run.dir={quoted(str(folder))}"]) == DONE
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("# ")
        harmless = "\n".join(lines).replace(shlex.quote(sys.executable), "echo")
        assert harmless.count("echo -m") == len(lines) - 1
        shell = subprocess.run(["bash"], input=harmless, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert shell.stderr == ""
        assert all(str(folder / "config.yaml") in line for line in shell.stdout.splitlines())
    assert not canary.exists()
    broken = tmp_path / f"x\ntouch {canary}"
    assert command(["train", *fixed, f"run.dir={quoted(str(broken))}"]) == USER_MISTAKE
    assert "control characters" in capsys.readouterr().err
    assert command(["train", *fixed, f"run.name='x;touch {canary}'"]) == USER_MISTAKE
    assert not canary.exists()


@pytest.mark.trial(TRIAL)
def test_a_secret_in_a_knob_is_refused_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    run = tmp_path / "run"
    for knob in (
        "data.path='https://me:opensesame@host.example/rows.jsonl'",
        f"log.tags=[{SECRETS['HF_TOKEN']}]",
        "data.sources=[{path: 'x://me:opensesame@host/a.jsonl'}]",
    ):
        assert command(["train", "data=jsonl", knob, f"run.dir={run}"]) == USER_MISTAKE
        said = "".join(capsys.readouterr())
        assert "holds what looks like a password, a token or a key" in said
        assert "opensesame" not in said
        assert SECRETS["HF_TOKEN"] not in said
    assert not run.exists()


@pytest.mark.trial(TRIAL)
def test_no_secret_in_any_file_log_tracker_or_command_line(tmp_path: Path) -> None:
    """A run with secrets around it: everything that it writes and every process that it starts."""
    shop = Shop.open(tmp_path)
    seen: set[str] = set()
    words = ("strategy=ddp", "launch.max_restarts=1", "max_steps=2", "log=wandb")
    with shop.start("run", *words, **SECRETS, WANDB_MODE="offline") as run:
        while run.process.poll() is None:
            for process in [psutil.Process(run.process.pid), *psutil.Process(run.process.pid).children(recursive=True)]:
                try:
                    seen.add(" ".join(process.cmdline()))
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            time.sleep(0.1)
        code, text = run.end()
    assert code == DONE, text
    assert {"preflight", "train"} <= {word for line in seen for word in line.split()}, seen  # its children were seen
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "command.txt", "environment.txt", "metrics.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for name, secret in SECRETS.items():
        assert secret not in text, name
        assert not [line for line in seen if secret in line], name
        assert not [path for path in files if secret.encode() in path.read_bytes()], name
    assert b"loss" in b"".join(path.read_bytes() for path in files)  # the control: the search finds what is there


Attack = Callable[[Path], None]


def tied_to_itself(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def too_long(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**30)  # a hole: it takes no disk


@pytest.mark.trial(TRIAL)
@pytest.mark.parametrize("attack", [tied_to_itself, too_long])
def test_a_configuration_that_would_exhaust_a_parser(attack: Attack, tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model")
    attack(folder)
    reason = refused(folder)
    assert "config.json" in reason


@pytest.mark.trial(TRIAL)
def test_two_files_that_hold_one_tensor(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file in ("a.safetensors", "b.safetensors"):
        save_file(tensors, folder / file)
    names = list(tensors)
    index = {"weight_map": {name: "ab"[position % 2] + ".safetensors" for position, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "two of its files hold" in refused(folder)
