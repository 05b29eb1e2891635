"""A model to train: opened whole, in float32, with what is to move marked; and written back.

    scales   scales and zero points of packed weights; the codes stay
    router   rows of the routers
    norms    vectors outside the experts: gains of norms, biases
    lora     an update of low rank to each matrix outside the experts that is not packed
    experts  matrices of the experts that are not packed
    all      everything

Several processes share the windows. A stock model is sharded by transformers' own DistributedConfig
(FSDP2, and experts over processes with `experts_over`), which wants accelerate; a packed one by torch's
`fully_shard`: codes lie whole in every process, what is trained and its moments do not. That also shards
what is to lie in host memory (`offload`), of one process, too: transformers loads shards to the GPU.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint as again
from transformers import AutoConfig

from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, RecipeError
from moecule.family import Family
from moecule.hf import (
    PACKED,
    auto_class,
    choose_experts,
    quiet,
    set_experts,
    skeleton,
)
from moecule.moe import experts_in, find_layers, find_moe
from moecule.names import names_in_memory
from moecule.session import Compute, check_whole, load, open_checkpoint
from moecule.train.low_rank import adapt, updates
from moecule.train.room import check_room, forget_pinned, opening
from moecule.train.shards import average, shard, whole
from moecule.train.thaw import PLAIN, thaw, thawed_names

Part = Literal["scales", "router", "norms", "lora", "experts", "all"]
PARTS: tuple[str, ...] = get_args(Part)
SHARDED = "5.20"  # the transformers that can put experts of training on several processes


@dataclass
class Student:
    """A model that can be trained."""

    model: Any
    checkpoint: Checkpoint
    family: Family
    compute: Compute
    packed: bool
    # {name in memory: names on disk that make it}, and the dtype that it has there
    disk: Mapping[str, list[str]]
    dtypes: Mapping[str, torch.dtype]

    @property
    def trainable(self) -> int:
        """Numbers that move, over all processes."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a source whose weights are codes of another kind, such as FP8."""
    if checkpoint.is_coded:
        raise CheckpointError(
            f"{checkpoint.name} is stored in codes that are not moecule's, and what training makes of it "
            "cannot be written back; give a model of 16 or 32 bits"
        )


def check_parts(parts: Sequence[str]) -> None:
    """Raise RecipeError for a part that there is not."""
    unknown = [p for p in parts if p not in PARTS]
    if unknown or not parts:
        raise RecipeError(f"parts {unknown or list(parts)}: wanted some of {', '.join(PARTS)}")


def open_student(
    model: str | Path,
    compute: Compute,
    *,
    parts: Sequence[str] = ("all",),
    experts_over: int = 1,
    offload: bool = False,
) -> Student:
    """Open a model to be trained: `parts` of it move. `experts_over`: processes that share experts.

    `offload`: what moves, its gradients and moments lie in host memory, and so does the rest of a stock
    model; a layer is on the GPU while it runs. See `check_offload`.
    Raises RecipeError for parts that the model has none of, too little memory, or experts that processes
    cannot share; CheckpointError where it does not load.
    """
    check_parts(parts)
    gc.collect()  # an earlier student whose forwards hold their modules
    checkpoint, ranks = open_checkpoint(model), compute.ranks
    check_plain(checkpoint)
    packed = checkpoint.config["model_type"] == PACKED
    compute = replace(compute, dtype="float32")
    net, family = skeleton(checkpoint, torch.float32)
    check_shared(checkpoint, net, family, ranks.size, experts_over, packed=packed, offload=offload)
    device, ours = compute.torch_device(), packed or offload or ranks.size == 1
    where = replace(compute, device="cpu") if offload and not packed else compute
    if offload and device.type == "cuda":
        forget_pinned()  # of an earlier student's shards
    with opening(checkpoint.name, device):
        found = load(model, where) if ours else _sharded(checkpoint, compute, experts_over)
        (thaw if packed else _run_plain)(found)
    disk = {n: [n] for n in checkpoint.tensors} if packed else names_in_memory(net, checkpoint)
    dtypes = {n: checkpoint.tensors[of[0]].dtype for n, of in disk.items()}
    student = Student(found, checkpoint, family, compute, packed, disk, dtypes)
    mark(student, parts)
    check_room(found, compute, offload=offload)
    if offload or packed and ranks.size > 1:
        shard(found, find_layers(found)[1], device, ranks, offload=offload)
    elif not ours:  # shards were made before there were updates
        average((p for u in updates(found).values() for p in u.parameters()), ranks)
    found.config.use_cache = False
    return student


def open_teacher(model: str | Path, compute: Compute) -> Any:
    """A model to learn from, whole in every process. Raises CheckpointError where it does not load."""
    checkpoint = open_checkpoint(model)
    with opening(checkpoint.name, compute.torch_device()):
        teacher = load(model, compute).requires_grad_(False)
    if checkpoint.config["model_type"] != PACKED:
        _run_plain(teacher)
    return teacher


def _run_plain(model: Any) -> None:
    """Grouped products in autocast's precision, where torch has them for the experts' widths."""
    choose_experts(model)
    if experts_in(model)[0][1].config._experts_implementation == "grouped_mm":
        set_experts(model, PLAIN)


def save_memory(student: Student) -> None:
    """Let decoder layers keep their input alone, and be computed again on the way back."""
    for layer in find_layers(student.model)[1]:
        layer.forward = partial(again, layer.forward, use_reentrant=False)


def check_shared(
    checkpoint: Checkpoint,
    model: Any,
    family: Family,
    size: int,
    experts_over: int,
    *,
    packed: bool,
    offload: bool = False,
) -> None:
    """Raise RecipeError where so many processes cannot train the model together."""
    if experts_over == 1 and (size == 1 or packed or offload):
        return
    if offload:
        raise RecipeError("experts over processes stay on the GPUs; leave out --offload")
    if packed:
        raise RecipeError(
            f"{checkpoint.name} is packed: codes lie whole in every process; leave out --experts-over"
        )
    if size % experts_over:
        raise RecipeError(
            f"{experts_over} of {size} processes are to share experts; give --experts-over a divisor"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise RecipeError(
            "training with several processes wants accelerate; pip install 'moecule[train]'"
        )
    if Version(transformers.__version__) < Version(SHARDED):
        raise RecipeError(
            f"training with several processes wants transformers {SHARDED} or newer, and this is "
            f"{transformers.__version__}; update it"
        )
    counts = {m.experts.num_experts for x in find_layers(model)[1] if (m := find_moe(x, family))}
    uneven = [n for n in counts if n % experts_over]
    if uneven:
        fits = [k for k in range(2, size + 1) if size % k == 0 and all(n % k == 0 for n in counts)]
        instead = f"give --experts-over {fits[-1]}" if fits else "leave out --experts-over"
        raise RecipeError(
            f"{experts_over} processes cannot share {uneven[0]} experts evenly; {instead}"
        )


def check_offload(compute: Compute) -> None:
    """Raise RecipeError where there is no GPU that what moves could be kept off."""
    device = compute.torch_device()
    if device.type != "cuda":
        raise RecipeError(
            f"--offload keeps weights in host memory for a GPU, and this trains on {device}; leave it out"
        )


def _sharded(checkpoint: Checkpoint, compute: Compute, experts_over: int) -> Any:
    """A stock model, of which every process holds its shards."""
    from transformers.distributed import DistributedConfig

    device, size = compute.torch_device().type, compute.ranks.size
    there = torch.accelerator.current_accelerator()
    if there is not None and there.type != device:  # transformers asks for no device here
        raise RecipeError(
            f"several processes train where the accelerator is ({there.type}), not on {device}; leave out "
            "--device, or start one process"
        )
    trust = compute.trust_remote_code
    over = {"ep_size": experts_over} if experts_over > 1 else {}
    try:
        with quiet():
            settings = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust)
            found, told = auto_class(type(settings)).from_pretrained(
                checkpoint.path,
                dtype=torch.float32,
                distributed_config=DistributedConfig(fsdp_size=size, **over),
                trust_remote_code=trust,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        said = next(iter(str(e).splitlines()), type(e).__name__)
        raise CheckpointError(
            f"{checkpoint.path} cannot be shared out by {size} processes: {said}; start fewer"
        ) from e
    check_whole(checkpoint, told)
    return found


def mark(student: Student, parts: Sequence[str], *, strict: bool = True) -> None:
    """Let `parts` alone want a gradient.

    Raises RecipeError for a part that the model has none of, where that is `strict`.
    """
    model = student.model
    model.requires_grad_(False)
    thawed, inside = thawed_names(model), _expert_names(model)
    routers = _router_names(student)
    named = dict(model.named_parameters())
    of: dict[str, set[str]] = {
        "scales": thawed,
        "router": {n for n in routers if n in named and n not in thawed},
        "norms": {n for n, p in named.items() if p.dim() == 1 and n not in inside},
        "experts": {n for n in inside if n in named and n not in thawed},
        "all": set(named),
    }
    for part in parts:
        if part == "lora":
            adapt(_matrices(model, routers), student.dtypes)
        found = bool(updates(model)) if part == "lora" else bool(of[part])
        if not found and strict:
            able = ", ".join(p for p, names in of.items() if names)
            raise RecipeError(
                f"{student.checkpoint.name} has no {part} that could move; --parts may name {able}"
            )
        for name in of.get(part, ()):
            named[name].requires_grad_(True)


def relative_rates(module: nn.Module) -> dict[str, float]:
    """{name: share of the rate} of what `thaw` made: scales move in proportion to their size.

    As Adafactor's relative steps do (Shazeer and Stern 2018, arXiv:1804.04235).
    """
    thawed = thawed_names(module)
    named = {n: whole(p.detach()) for n, p in module.named_parameters() if n in thawed}
    return {n: float(p.double().square().mean().sqrt()) for n, p in named.items()}


def _expert_names(model: Any) -> set[str]:
    return {f"{name}.{n}" for name, m in experts_in(model) for n, _ in m.named_parameters()}


def _router_names(student: Student) -> set[str]:
    prefix, layers = find_layers(student.model)
    out = set()
    for i, layer in enumerate(layers):
        moe = find_moe(layer, student.family)
        if moe is not None:
            inside = {id(p) for p in moe.router.parameters()}
            out |= {f"{prefix}.{i}.{n}" for n, p in layer.named_parameters() if id(p) in inside}
    return out


def _matrices(model: Any, routers: set[str]) -> dict[str, nn.Linear]:
    """Every plain Linear of the decoder layers, but routers and experts."""
    prefix, layers = find_layers(model)
    experts = tuple(f"{name}." for name, _ in experts_in(model))
    return {
        name: module
        for name, module in ((f"{prefix}.{n}", m) for n, m in layers.named_modules())
        if isinstance(module, nn.Linear)
        and "weight" in module._parameters
        and f"{name}.weight" not in routers
        and not name.startswith(experts)
    }
