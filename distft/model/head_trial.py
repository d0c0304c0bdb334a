"""Which arithmetic the head's loss gets: on CUDA the fastest in a short trial at the run's shape, if it is right."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.errors import UserMistake
from distft.model.cross_entropy import WAYS, Gradients
from distft.model.loss import HeadRequest, Tail, tail_of
from distft.world import World, sum_over

POSITIONS = 4096  # at most so many in a trial
REPEATS = 5
MARGIN = 0.97  # of our own time: less than that is no reason to leave it
NLL_BOUND, GRADIENT_BOUND = 1e-2, 2e-2  # relative to ours; bf16 carries 8 bits


@dataclass(frozen=True)
class Shape:
    """What a trial is made at."""

    positions: int
    dim: int
    vocabulary: int
    dtype: str  # in which the products run: bfloat16 or float32
    trained: bool  # whether the head's weight wants a gradient
    chunk: int
    by_position: bool  # more than one source: the NLL is wanted at every position


@dataclass(frozen=True)
class Finding:
    """One way's result at a shape."""

    milliseconds: float | None  # of the loss and its gradients; None: not to be had or wrong
    why_not: str = ""


def settle(
    trainee: Any, wanted: str, world: World, precision: str, num_tokens: int, by_position: bool, cache: Path
) -> list[str]:
    """Set `trainee.head_way`, the same on every rank. Call it before the engine takes the device's memory. Collective.

    wanted: `model.head`. num_tokens: positions of a micro-batch. cache: folder where findings are kept, so that a run
    that goes on later on the same kind of device computes as it did before. Returns what the user should know.

    Raises:
        UserMistake: `wanted` cannot be had here.
    """
    model = trainee.model
    head = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()
    if wanted in ("auto", "chunked") and (world.device.type != "cuda" or wanted == "chunked"):
        return []
    if trainee.notes or world.device.type != "cuda":
        reason = "this model's logits come from its own forward" if trainee.notes else "it needs a CUDA GPU"
        if wanted == "auto":
            return []
        raise UserMistake(f"model.head={wanted} cannot be used: {reason}. Use model.head=auto or chunked.")
    shape = Shape(
        positions=min(num_tokens, POSITIONS),
        dim=head.weight.shape[1],
        vocabulary=head.weight.shape[0],
        dtype="bfloat16" if precision == "bf16" else "float32",
        trained=head.weight.requires_grad,
        chunk=trainee.vocab_chunk,
        by_position=by_position,
    )
    tail = tail_of(trainee.config)
    findings: dict[str, Finding] = {}
    if world.is_main:
        findings = remembered(cache, shape, tail, world.device)
    number = list(WAYS).index(choice(findings, wanted)) if world.is_main else 0
    trainee.head_way = list(WAYS)[int(sum_over(world, torch.tensor(number, device=world.device)))]
    if trainee.head_way != wanted and wanted != "auto":
        reason = findings[wanted].why_not if findings else "see rank 0"
        raise UserMistake(f"model.head={wanted} cannot be used: {reason}. Use model.head=auto or chunked.")
    return [told(findings, trainee.head_way)] if findings else []


def choice(findings: dict[str, Finding], wanted: str) -> str:
    """The way to take: the one wanted if it can be had, under `auto` the fastest, ours unless another is clearly so."""
    times = {way: finding.milliseconds for way, finding in findings.items() if finding.milliseconds is not None}
    if wanted != "auto":
        return wanted if wanted in times else "chunked"
    best = min(times, key=lambda way: times[way], default="chunked")
    ours = times.get("chunked", 0.0)
    return best if times.get(best, ours) < MARGIN * ours else "chunked"


def told(findings: dict[str, Finding], chosen: str) -> str:
    times = (
        f"{way} {finding.why_not if finding.milliseconds is None else f'{finding.milliseconds:.2f} ms'}"
        for way, finding in findings.items()
    )
    return f"Head and loss: {chosen} (tried here: {'; '.join(times)})"


def remembered(cache: Path, shape: Shape, tail: Tail, device: torch.device) -> dict[str, Finding]:
    """The findings kept in `cache` for this shape, device and these versions; made and kept if there are none."""
    key = json.dumps([*asdict(shape).values(), *asdict(tail).values(), *surroundings(device)])
    path = cache / "head_trials.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    if key not in kept:
        kept[key] = {way: asdict(finding) for way, finding in trial(shape, tail, device).items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        except OSError:  # a cache that cannot be written only costs the trial again
            pass
    return {way: Finding(**finding) for way, finding in kept[key].items()}


def surroundings(device: torch.device) -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        liger = version("liger-kernel")
    except PackageNotFoundError:
        liger = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [name, torch.__version__, liger]


def trial(shape: Shape, tail: Tail, device: torch.device, repeats: int = REPEATS) -> dict[str, Finding]:
    """Run every way on random numbers of `shape`; one that fails or is off from ours is not to be had."""
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(shape.positions, shape.dim, generator=generator, device=device).to(dtype)
    weight = torch.randn(shape.vocabulary, shape.dim, generator=generator, device=device)
    weight = weight.mul_(shape.dim**-0.5).to(dtype)  # logits of a spread of 1
    targets = torch.randint(shape.vocabulary, (shape.positions,), generator=generator, device=device)
    needs = (True, shape.trained, False)
    findings: dict[str, Finding] = {}
    ours: tuple[Tensor, Gradients] | None = None
    for name, way in WAYS.items():
        request = HeadRequest(tail, targets, shape.chunk, name, shape.by_position)
        call = partial(way, hidden, weight, None, request, needs, None)
        try:
            with torch.no_grad():
                answer = call()  # the first time a kernel may be compiled
                complaint = off(answer, ours) if ours else ""
                ours = ours or answer
                del answer
                times = [] if complaint else [timed(call, device) for _ in range(repeats)]
        except Exception as error:  # a package of another version may raise anything
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            findings[name] = Finding(None, f"cannot: {said}".split("\n")[0][:160])
            continue
        findings[name] = Finding(None, complaint) if complaint else Finding(1e3 * statistics.median(times))
    if device.type == "cuda":
        del hidden, weight, ours
        torch.cuda.empty_cache()
    return findings


def off(answer: tuple[Tensor, Gradients], ours: tuple[Tensor, Gradients]) -> str:
    """What is wrong with an answer, or an empty string."""
    (nll, gradients), (our_nll, our_gradients) = answer, ours
    total, our_total = float(nll.sum()), float(our_nll.sum())
    if not abs(total - our_total) <= NLL_BOUND * abs(our_total):
        return f"wrong: a loss of {total:.6g}, ours is {our_total:.6g}"
    for name, got, want in zip(("hidden states", "weight"), gradients, our_gradients, strict=False):
        if (got is None) != (want is None):
            return f"wrong: the gradient of {name} is missing or too many"
        if got is not None and want is not None:
            distance, size = float((got.float() - want.float()).norm()), float(want.float().norm())
            if not distance <= GRADIENT_BOUND * size:
                return f"wrong: the gradient of {name} is off by {distance / max(size, 1e-30):.1%}"
    return ""


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
