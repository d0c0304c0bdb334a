"""An environment for each program, made once and kept outside the checkout: `python -m venv`, then pip.

PyTorch comes first and exactly, from its CPU wheels where --torch-index has them, and a constraint keeps it: an open
range would fetch gigabytes of CUDA. LLaMA-Factory asks for torchvision and torchaudio, which have no place in training
on text; it is installed without them, with an empty `torchaudio` because it imports that by name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
WITH_TRANSFORMERS = ("transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "peft==0.21.2")
LLAMAFACTORY = "llamafactory==0.9.5"
WANTED: dict[str, tuple[str, ...]] = {
    "TRL": ("trl==1.16.0", *WITH_TRANSFORMERS),
    "Trainer": WITH_TRANSFORMERS,
    # What llamafactory 0.9.5 declares, less torch, torchvision and torchaudio; the newest versions that it allows.
    "LLaMA-Factory": (
        "accelerate>=1.3.0,<=1.11.0", "av>=10.0.0,<=16.0.0", "datasets>=2.16.0,<=4.0.0", "einops", "fastapi", "fire",
        "gradio>=4.38.0,<=5.50.0", "hf-transfer", "matplotlib>=3.7.0", "modelscope", "numpy", "omegaconf", "packaging",
        "pandas", "peft>=0.18.0,<=0.18.1", "protobuf", "pydantic", "pyyaml", "safetensors", "scipy", "sentencepiece",
        "sse-starlette", "tiktoken", "torchdata>=0.10.0,<=0.11.0",
        "transformers>=4.55.0,<=5.6.0,!=4.57.0", "trl>=0.18.0,<=0.24.0", "tyro<0.9.0", "uvicorn",
    ),
}  # fmt: skip
SAID = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "llamafactory", "tokenizers")


def python_of(name: str, environments: Path) -> Path:
    """The interpreter that runs a program: distft's own is the one that runs this."""
    if name == "distft":
        return Path(sys.executable)
    return folder_of(name, environments) / "bin" / "python"


def folder_of(name: str, environments: Path) -> Path:
    return environments / name.lower().replace("-", "")


def make(name: str, environments: Path, torch_index: str) -> None:
    """Make the environment of one program unless it is there as it should be."""
    if name == "distft":
        return
    folder = folder_of(name, environments)
    stamp, wanted = folder / "made.json", [TORCH, *WANTED[name]]
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return
    print(f"Making the environment of {name} in {folder}; a few minutes.", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraint = folder / "constraints.txt"
    constraint.write_text(TORCH + "\n", encoding="utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--extra-index-url", torch_index, TORCH], check=True)
    subprocess.run([*pip, "--constraint", str(constraint), *WANTED[name]], check=True)
    if name == "LLaMA-Factory":
        subprocess.run([*pip, "--no-deps", LLAMAFACTORY], check=True)
        libraries = next((folder / "lib").glob("python3*/site-packages"))
        (libraries / "torchaudio.py").write_text("", encoding="utf-8")
    stamp.write_text(json.dumps(wanted), encoding="utf-8")


def versions(python: Path) -> dict[str, str]:
    """The versions that matter, as that interpreter sees them."""
    code = (
        "import importlib.metadata as m, json\n"
        f"names = {SAID!r}\n"
        "here = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: here[n] for n in names if n in here}))"
    )
    answer = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    return {str(name): str(version) for name, version in json.loads(answer).items()}
