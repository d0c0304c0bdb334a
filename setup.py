"""Packaging: the ranges that are meant. The versions that the tests ran with are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

SWEEP = ["hydra-submitit-launcher>=1.2,<2", "submitit>=1.5,<2", "optuna>=5,<6", "plotly>=7,<8", "scipy>=1.14,<2"]
EXTRAS = {
    "flash": ["flash-attn>=2.8"],
    "kernels": ["liger-kernel>=0.8,<0.9"],
    "quant": ["bitsandbytes>=0.50,<0.51"],
    "sweep": SWEEP,
    "dev": [
        *SWEEP,
        "import-linter>=2.16",
        "matplotlib>=3.10",
        "mypy>=2.4",
        "pytest>=9",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        "setuptools>=77",
        "types-PyYAML",
    ],
}

setup(
    name="distft",
    version="0.1.0",
    description="Fine-tune Hugging Face language models with DDP, DeepSpeed ZeRO or FSDP2, configured by Hydra",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=["distft", "distft.*"]),
        *find_namespace_packages(include=["hydra_plugins.*"]),
        "distft.conf",
    ],
    package_dir={"distft": "distft", "distft.conf": "conf"},
    package_data={"distft.conf": ["*.yaml", "*/*.yaml"]},
    entry_points={"console_scripts": ["distft=distft.cli:main"]},
    install_requires=[
        "datasets>=5.2,<6",
        "deepspeed>=0.19.8,<0.20",
        "huggingface_hub>=1.31,<3",
        "hydra-core>=1.3.8,<1.4",
        "jinja2>=3.1.4,<4",
        "numpy>=2,<3",
        "omegaconf>=2.3.1,<2.4",
        "packaging>=24",
        "peft>=0.21,<0.22",
        "psutil>=7,<8",
        "pyarrow>=24",
        "pyyaml>=6,<7",
        "rich>=14,<16",
        "safetensors>=0.8,<0.9",
        "tensorboard>=2.21,<3",
        "tokenizers>=0.23",
        "torch>=2.11,<2.14",
        "transformers>=5.17,<6",
        "wandb>=0.31,<0.32",
        "xxhash>=3.5,<5",
    ],
    extras_require=EXTRAS,
)
