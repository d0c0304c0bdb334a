"""`distft verify <folder>`: is this checkpoint, model or adapter what was saved?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distft.config.ranges import RANGES
from distft.config.schema.verify import Verify
from distft.errors import DONE, NEGATIVE_VERDICT, UserMistake

if TYPE_CHECKING:
    from distft.weights.findings import Finding


def main(verify: Verify, folder: str) -> int:
    """Look over every checkpoint and finished folder that `folder` is or holds, a line a check and one for the verdict.

    `folder`: a model's or an adapter's folder, a checkpoint, or the folder of a run. Returns 0, or 3 if anything is
    wrong; what could not be checked is said and does not count as wrong.

    Raises:
        UserMistake: the folder is nothing of the sort.
    """
    allowed, wanted = RANGES["verify.max_memory"]
    if verify.verify.max_memory is not None and not allowed(verify.verify.max_memory):
        raise UserMistake(f"verify.max_memory={verify.verify.max_memory}: {wanted} is wanted (GiB).")
    path = Path(folder).expanduser()
    places = places_of(path)
    if not places:
        from distft.model.folder import nearest_folder

        kind = "holds no checkpoint, model or adapter" if path.is_dir() else "is no folder"
        raise UserMistake(f"{path} {kind}.{nearest_folder(path)}")
    verdicts = [tell(place, findings_of(place, verify)) for place in places]
    return DONE if all(verdicts) else NEGATIVE_VERDICT


def places_of(path: Path) -> list[Path]:
    """The folders to look over: the one given, or all of a run's checkpoints and its final/."""
    if is_checkpoint(path) or is_finished(path):
        return [path]
    steps = sorted(step for step in (path / "checkpoints").glob("step-*") if is_checkpoint(step))
    return [*steps, *(place for place in [path / "final"] if is_finished(place))]


def is_checkpoint(path: Path) -> bool:
    """By its files or, where the manifest is lost, by its name and one rank's file."""
    from distft.checkpoint.layout import MANIFEST, STEP

    named = STEP.fullmatch(path.absolute().name) is not None and any(path.glob("rank-*.safetensors"))
    return (path / MANIFEST).is_file() or named


def is_finished(path: Path) -> bool:
    from distft.model.proof import PROOF_FILE

    return any((path / name).is_file() for name in ("adapter_config.json", "config.json", PROOF_FILE))


def findings_of(place: Path, verify: Verify) -> list[Finding]:
    from distft.checkpoint.verify import memory_bound, verify_checkpoint
    from distft.model.verify import verify_folder

    look = verify_checkpoint if is_checkpoint(place) else verify_folder
    return look(place, memory_bound(verify.verify.max_memory), verify.trust_remote_code)


def tell(place: Path, findings: list[Finding]) -> bool:
    """Print what was found of one folder; whether nothing is wrong."""
    from distft.weights.findings import verdict

    for finding in findings:
        print(f"  {finding}")
    print(f"{place}: {verdict(findings)}", flush=True)
    return all(finding.passed is not False for finding in findings)
