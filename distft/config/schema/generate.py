from __future__ import annotations

from dataclasses import dataclass

from distft.config.schema.knob import choice


@dataclass
class Generate:
    """Everything that decides what `distft generate <folder>` answers."""

    prompt: str | None = None
    """One question; its answer is printed as it is made."""

    prompts: str | None = None
    """File of questions: a line each, or JSON lines with `prompt`, `question`, `instruction` or `messages`."""

    system: str | None = None
    """System message before every question. Only for models with a chat template."""

    max_new_tokens: int = 256
    """Longest answer."""

    temperature: float = 0.0
    """0: the likeliest token every time; larger values draw more freely."""

    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this share of the probability. Needs a temperature above 0."""

    seed: int = 0
    """Decides what is drawn."""

    batch_size: int = 8
    """Questions of `prompts` that are answered together."""

    output: str | None = None
    """Write JSON lines with each question's fields and its `answer` to this file."""

    precision: str = choice("auto", "fp32", "bf16")
    """auto: bf16 on a GPU, fp32 on a CPU."""

    trust_remote_code: bool = False
    """Run Python that lies in the model's folder. Only for folders you have read."""
