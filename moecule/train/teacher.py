"""What a teacher says of each token, kept on disk: its likeliest next tokens, for when it does not fit.

It runs layer by layer over all windows, once. Of a token 6 bytes for each of the k are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from moecule.files import save_whole
from moecule.hf import Streamed
from moecule.journal import Trail
from moecule.train.losses import top_k_of
from moecule.walk import Tick, finish, walk


@dataclass(frozen=True)
class Said:
    """In `folder`, a file for every `each` windows."""

    folder: Path
    each: int

    def of(
        self, rows: Sequence[int], device: torch.device
    ) -> tuple[Int[Tensor, "B S k"], Float[Tensor, "B S k"]]:
        """(ids, log probabilities) of some windows by their numbers."""
        files = {
            n: load_file(_file(self.folder, n)) for n in sorted({r // self.each for r in rows})
        }
        parts = [(files[r // self.each], r % self.each) for r in rows]
        ids = torch.stack([f["ids"][at] for f, at in parts]).to(device)
        return ids.long(), torch.stack([f["logp"][at] for f, at in parts]).to(device).float()


def _file(folder: Path, n: int) -> Path:
    return folder / f"said-{n:06d}.safetensors"


@torch.no_grad()
def say(
    streamed: Streamed,
    windows: Int[Tensor, "N S"],
    folder: Path,
    k: int,
    each: int,
    tick: Tick,
    trail: Trail,
) -> Said:
    """Ask the teacher about all windows, `each` together; what `folder` has is not asked again."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = list(windows.split(each))
    left = [n for n in range(len(batches)) if not _file(folder, n).is_file()]
    if left:
        walked = finish(walk(streamed, batches, tick, trail))
        for n in left:
            ids, logp = top_k_of(streamed.logits(walked.last[n], batches[n]), k)
            kept = {"ids": ids.int().cpu(), "logp": logp.half().cpu()}
            save_whole(kept, _file(folder, n), sync=False)
        walked.last.drop()
    return Said(folder, each)
