"""Whether a written checkpoint, opened in a fresh process, computes what the walk computed.

python -m moecule.verify FOLDER PROBE DTYPE DEVICE

Layer by layer, each from the walk's own input: over many layers rounding in 16 bits grows to where it
hides a mistake, for it sends tokens to another expert of nearly the same score. What is written must
also be what is in memory after loading, bit for bit.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from moecule.batch import Batch
from moecule.checkpoint import Checkpoint
from moecule.errors import VerifyError
from moecule.files import save_whole
from moecule.hf import PACKED
from moecule.moe import find_layers
from moecule.record import Call, logits, record
from moecule.session import Compute, fits, load, stream_any
from moecule.walk import Step

PROBE_TOKENS = 256
# A token of a layer is off where its output differs by more than this share of what the layer added,
# and by more than two roundings of the output itself. Some may be, where experts score alike.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
MOST_OFF = {torch.float32: 0.01, torch.float16: 0.25, torch.bfloat16: 0.25}


def probe_of(batch: Batch, takes: str | None) -> dict[str, Tensor]:
    """The part of a batch that is compared: a sequence's first tokens.

    All of it where layers hand on what speaks of the whole sequence (`takes`), or pictures are in it.
    """
    n = PROBE_TOKENS if takes is None else None
    return {"input_ids": batch[:1, :n]} if isinstance(batch, Tensor) else dict(batch)


def keep_probe(step: Step, probe: Path, n: int) -> None:
    """What the first `n` tokens of the first sequence became in this layer, into the folder `probe`."""
    given, handed = step.inputs.both(0)
    tensors = {"given": given[:1, :n], "made": step.outputs[0][:1, :n]}
    if handed is not None:
        tensors["handed"] = handed[:1]
    probe.mkdir(parents=True, exist_ok=True)
    ready = {n: t.cpu().contiguous() for n, t in tensors.items()}
    save_whole(ready, probe / f"layer_{step.index:04d}.safetensors", sync=False)


def verify(
    folder: Path,
    batch: Mapping[str, Tensor],
    want: Float[Tensor, "one S V"],
    probe: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Open `folder` in a fresh process and compare with `probe` and the logits of `batch`.

    Raises VerifyError where they differ by more than rounding explains, or the folder does not load.
    """
    given = {name: t.cpu().contiguous() for name, t in batch.items()}
    save_whole(given, probe / "batch.safetensors", sync=False)
    end = {"logits": want.float().cpu().contiguous()}
    save_whole(end, probe / "end.safetensors", sync=False)
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "moecule.verify", *map(str, (folder, probe, name, device))]
    run = subprocess.run(command, capture_output=True, text=True)
    text = run.stdout if run.returncode == 0 else run.stderr
    line = next(reversed(text.strip().splitlines()), "no output")
    if run.returncode != 0:
        raise VerifyError(
            f"what was written does not load in a fresh process: {line}; run it again, and report "
            "it if that stays"
        )
    if line != "same":
        raise VerifyError(
            f"what was written computes something else: {line}; it was not put in "
            "place: run it again, with another --dtype, or report it"
        )


def _child(folder: Path, probe: Path, dtype: torch.dtype, device: torch.device) -> str:
    """ "same", or what differs."""
    compute = Compute(str(device), str(dtype).removeprefix("torch."))
    batch, want = (load_file(probe / f"{name}.safetensors") for name in ("batch", "end"))
    streamed = stream_any(folder, compute)
    model = streamed.model
    layer_of: Callable[[int], nn.Module] = streamed.load_layer
    if fits(streamed):  # then as users load it
        model = load(folder, compute)
        layer_of = list(find_layers(model)[1]).__getitem__
        said = _misread(streamed.checkpoint, model)
        if said:
            return said
    with torch.no_grad():
        _, calls = record(model, batch, takes=streamed.family.takes)
        for i, call in enumerate(calls):
            said = _layer(probe / f"layer_{i:04d}.safetensors", call, layer_of(i), device, dtype)
            if said:
                return f"layer {i}: {said}"
        last = load_file(probe / f"layer_{len(calls) - 1:04d}.safetensors")["made"].to(device)
        got = logits(model, last, batch, streamed.family.takes).cpu()
    share = _off(got, want["logits"], torch.zeros_like(got), dtype)
    return "same" if share <= MOST_OFF[dtype] else f"logits of {share:.1%} of the tokens differ"


def _layer(
    file: Path, call: Call, layer: nn.Module, device: torch.device, dtype: torch.dtype
) -> str | None:
    seen = {n: t.to(device) for n, t in load_file(file).items()}
    got, _ = call(layer, seen["given"], seen.get("handed"))
    share = _off(got, seen["made"], seen["given"], dtype)
    return None if share <= MOST_OFF[dtype] else f"{share:.1%} of the tokens differ"


def _off(
    got: Float[Tensor, "one S *H"],
    want: Float[Tensor, "one S *H"],
    given: Float[Tensor, "one S *H"],
    dtype: torch.dtype,
) -> float:
    """The share of tokens that are off."""
    got, want, given = (t.double().flatten(2) for t in (got, want, given))
    rounding = 2 * torch.finfo(dtype).eps * want.norm(dim=-1)
    room = TOLERANCE[dtype] * (want - given).norm(dim=-1) + rounding
    near = (got - want).norm(dim=-1) <= room  # NaN is not near
    return 1.0 - float(near.double().mean())


def _misread(checkpoint: Checkpoint, model: nn.Module) -> str | None:
    """What is in memory otherwise than on disk, where names are the same in both."""
    if checkpoint.config["model_type"] != PACKED:
        return None
    held = model.state_dict()
    for name in checkpoint.tensors:
        (there,) = checkpoint.read([name]).values()
        if name not in held or not torch.equal(held[name].cpu(), there.to(held[name].dtype)):
            return f"{name} is loaded otherwise than it was written"
    return None


if __name__ == "__main__":
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where, probed, kind, place = sys.argv[1:]
    print(_child(Path(where), Path(probed), getattr(torch, kind), torch.device(place)))
