"""What the checks of one finished folder share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from distft.config.schema import Run
from distft.config.schema.model import Model
from distft.model.foreign import ADAPTER_CONFIG, ADAPTER_FILE
from distft.model.plain import base_of_adapter
from distft.model.proof import PROOF_FILE, Proof
from distft.weights.store import FolderWeights, shard_files

NOT_OURS = f"the folder has no {PROOF_FILE}: it was not saved by distft, or by a version that wrote none"


@dataclass
class Subject:
    """A folder under verification, and what its checks share."""

    folder: Path
    proof: Proof | None
    max_bytes: float
    trust_remote_code: bool
    device: torch.device
    damaged: bool = False  # its files are not what was saved, so the model is not built from them

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).exists()

    def weights(self) -> FolderWeights:
        files = [ADAPTER_FILE] if self.is_adapter else shard_files(self.folder)[0]
        return FolderWeights(self.folder, files)

    def run(self) -> Run:
        """What `build` needs to know of a run."""
        return Run(model=Model(name="hf", path=str(self.folder), trust_remote_code=self.trust_remote_code))

    def base(self) -> tuple[str, Path | None]:
        """An adapter's base by name, and its folder where it is on this machine; nothing is fetched."""
        name, revision = base_of_adapter(self.folder)
        assert name is not None
        if Path(name).is_dir():
            return name, Path(name)
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, "config.json", revision=revision)
        except HFValidationError:
            found = None
        return name, Path(found).parent if isinstance(found, str) else None
