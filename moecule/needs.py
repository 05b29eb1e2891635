"""What a recipe will need before it is run: memory of the device and of the host, and disk.

Of evaluating, what the pass by layer holds (depth.py); of what text losses are measured is not known here.
Sums over what is held at the same time, from shapes alone. All sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from moecule.budget import Inventory, LayerExperts
from moecule.data import window_length
from moecule.depth import BESIDE, SAMPLE_TOKENS
from moecule.experts import Expert, Experts
from moecule.hf import Streamed
from moecule.method import load_method
from moecule.moe import find_moe
from moecule.pack import DEVICE_SHARE, HOST_CHUNK_BYTES
from moecule.recipe import Recipe
from moecule.session import Compute, state_bytes
from moecule.states import Place, choose_place
from moecule.stats import Routed, Seen, Statistic
from moecule.subset import SAMPLE, SAMPLE_BYTES
from moecule.writer import SINGLE_BYTES

RUNTIME_BYTES = 450 * 10**6  # Python, torch, transformers, and what their kernels keep
KEPT_BYTES = 300 * 10**6  # freed pieces that the allocator of a CPU does not give back, at most
FULL = 4  # times its even share that the busiest expert gets of a batch
Sizes = dict[str, int]  # by what is held
Moments = dict[str, dict[tuple[str, str], int]]


@dataclass(frozen=True)
class Work:
    """The size of what a recipe does to a model."""

    layers: int
    tokens: int  # of the calibration text
    batch: int  # tokens that pass together
    window: int
    hidden: int
    token_bytes: int  # of a token, that pass from one layer to the next
    vocabulary: int
    item: int  # bytes of a number as it is computed
    top_k: int
    widest: LayerExperts  # the layer of the most expert weights
    layer_weights: int  # of the largest layer, and of all layers
    all_layer_weights: int
    layer_stored: int  # bytes of the largest layer, decoded
    layer_coded: int  # as they are on disk, which is how they are read for a GPU
    all_stored: int
    outer_weights: int  # embeddings, head, norms
    rest: tuple[tuple[int, int], ...]  # rows and columns of a layer's weights but the experts
    heads: int
    eager_attention: bool
    backward: bool
    trials: float  # passes through an expert of each of its tokens, besides the layer's own
    widths: int  # that trials hold an expert's weights at, together
    wants_gram: bool
    searched: bool  # whether sets of experts are tried on a sample of the tokens
    skips: bool  # whether experts are skipped online, which is then measured, too

    @property
    def copies(self) -> int:
        """Of all tokens' hidden states, at most at a time while calibrating."""
        return self.layers + 3 if self.backward else 3

    @property
    def states(self) -> int:
        """Bytes of the hidden states of all tokens at one point of the model."""
        return self.tokens * self.token_bytes


@dataclass(frozen=True)
class Needs:
    """At the peak of calibrating, applying and evaluating by layer. On a CPU all memory is the host's."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int  # beside the source: hidden states to go on from, statistics, the output
    states: Place  # where hidden states lie
    states_bytes: int
    host_terms: Mapping[str, int]  # what makes up the peaks
    device_terms: Mapping[str, int]
    disk_terms: Mapping[str, int]


def work_of(streamed: Streamed, inventory: Inventory, recipe: Recipe) -> Work:
    """From shapes alone. Raises DataError for windows longer than the model knows."""
    config = streamed.model.config.get_text_config()
    numel = {n: t.numel() for n, t in streamed.model.state_dict().items()}
    tensors = streamed.checkpoint.tensors
    by_layer = [streamed.layer_names(i) for i in range(len(streamed.layers))]
    weights = [sum(numel[n] for n in names) for names in by_layer]
    read = [{d for n in names for d in streamed.disk[n]} for names in by_layer]
    stored = [sum(tensors[d].decoded_bytes for d in of) for of in read]
    moes = [m for layer in streamed.layers if (m := find_moe(layer, streamed.family))]
    where = max(inventory.experts, key=lambda i: inventory.experts[i].weights)
    window = window_length(streamed.model.config, recipe.data.length)
    needs = recipe.counted()
    return Work(
        layers=len(streamed.layers),
        tokens=recipe.data.samples * window,
        batch=min(recipe.data.batch, recipe.data.samples) * window,
        window=window,
        hidden=config.hidden_size,
        token_bytes=state_bytes(streamed),
        vocabulary=config.vocab_size,
        item=streamed.model.dtype.itemsize,
        top_k=max(m.top_k for m in moes),
        widest=max(inventory.experts.values(), key=lambda e: e.n * e.weights),
        layer_weights=max(weights),
        all_layer_weights=sum(weights),
        layer_stored=max(stored),
        layer_coded=max(sum(tensors[d].size_bytes for d in of) for of in read),
        all_stored=sum(stored),
        outer_weights=sum(numel[n] for n in streamed.outer_names()),
        rest=tuple(w.shape for w in inventory.weights.values() if w.layer == where),
        heads=config.num_attention_heads,
        eager_attention=config._attn_implementation == "eager",
        backward=any(s.backward for s in needs),
        trials=passes_of(needs, max(m.experts.num_experts / m.top_k for m in moes)),
        widths=round(passes_of([s for s in needs if s.of_experts is None])),
        searched=any(s.of_block for s in needs),
        skips=recipe.skip is not None,
        wants_gram=(recipe.rounds and load_method(recipe.encode.method, "encode").wants_gram)
        or (recipe.mask is not None and load_method(recipe.mask.method, "mask").wants_gram),
    )


def passes_of(statistics: Sequence[Statistic], others: float = 1.0) -> float:
    """How often a token goes through its expert for them: their products on a toy, counted.

    `others`: experts of a layer, for each that a token gets; some statistics run all.
    """
    seen = toy_seen()
    e, blank = seen.expert, seen.x[:, :1]
    one = Experts(e.gate_up[None], e.down[None], e.gate)
    dense = [s.of_experts(one) for s in statistics if s.of_experts is not None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for s in statistics:
            if s.of is not None:
                s.of(seen)
            elif s.of_expert is not None:
                s.of_expert(seen.expert)(seen)
    flop = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for of in dense:
            of(seen.x, Routed(blank, blank, seen.rank[:, None], blank))
    weights = e.gate_up.numel() + e.down.numel()
    return float(flop + others * counter.get_total_flops()) / (2 * len(seen.x) * weights)


def toy_seen() -> Seen:
    """A small expert and what it saw, to try statistics on."""
    hidden, wide, t = 64, 32, 2
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(2 * wide, hidden, generator=g), torch.randn(hidden, wide, generator=g)
    toy = Expert(up, down, lambda y: y[..., :wide])
    x, ones, rank = torch.randn(t, hidden, generator=g), torch.ones(t), torch.zeros(t).long()
    return Seen(
        x, ones, ones, ones, rank, ones, toy.act(x), toy(x), toy(x), x, ones,
        top_k=2, renormalised=True, expert=toy,
    )  # fmt: skip


def needs_of(work: Work, out_bytes: int, compute: Compute) -> Needs:
    """`out_bytes`: of the checkpoint that is to be made. Where there is room is asked now."""
    device, size = compute.torch_device(), compute.ranks.size
    work = replace(work, tokens=-(-work.tokens // size))  # of one of the processes
    place = compute.states
    if place == "auto":
        place = choose_place(work.states, work.copies, device)
    # as in session.trail_of
    close = device.type == "cpu" or choose_place(work.states, 4, device) == "device"
    aside = "device" if close else "host"
    chunk = HOST_CHUNK_BYTES
    if device.type == "cuda":
        chunk = int(DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    on_device, on_host = Sizes(), Sizes()
    # bytes of a layer as it is read
    read = work.layer_coded if device.type == "cuda" else work.layer_stored
    moments = _moments(work, out_bytes, chunk, read)
    for name, moment in moments.items():
        near, far = Sizes(), {"Python, torch, transformers": RUNTIME_BYTES}
        for (what, where), size in moment.items():
            side = {"states": place, "heard": aside}.get(where, where)
            if side != "disk":
                (near if side == "device" and device.type == "cuda" else far)[what] = size
        if device.type == "cpu":  # at the end the pieces of what was before are there yet
            before = moments["round"] if name == "check" else moment
            held = sum(before.values()) // (1 if name == "check" else 2)
            far["what the allocator keeps"] = min(held, KEPT_BYTES)
        on_device = max(on_device, near, key=lambda sizes: sum(sizes.values()))
        on_host = max(on_host, far, key=lambda sizes: sum(sizes.values()))
    on_disk = _disk(work, out_bytes)
    return Needs(
        device_bytes=sum(on_device.values()),
        host_bytes=sum(on_host.values()),
        disk_bytes=sum(on_disk.values()),
        states=place,
        states_bytes=work.copies * work.states,
        host_terms=on_host,
        device_terms=on_device,
        disk_terms=on_disk,
    )


def _disk(work: Work, out_bytes: int) -> Sizes:
    """At the worse of two times: while calibrating, and while the output is put together."""
    kept = {"hidden states to go on from": work.copies * work.states}
    # a small checkpoint is written in parts and then as one file
    twice = 2 if out_bytes <= SINGLE_BYTES else 1
    made = {"hidden states to go on from": 3 * work.states, "output": twice * out_bytes}
    return max(kept, made, key=lambda sizes: sum(sizes.values()))


def _moments(work: Work, out_bytes: int, chunk: int, read: int) -> Moments:
    """{moment: {(what, where): bytes}}: device, host, or where hidden states or what is heard lie."""
    item, hidden, e = work.item, work.hidden, work.widest
    rows, wide = e.gate_up[0], e.down[1]
    layer = {
        ("embeddings and head", "device"): work.outer_weights * item,
        ("a layer", "device"): work.layer_weights * item,
    }
    ahead = {("the next layer, read ahead", "host"): read}
    passing = {("a batch in the layer", "device"): _activations(work)}
    states = {("hidden states", "states"): work.copies * work.states}
    few = {("hidden states", "states"): 3 * work.states}
    # x; expert and rank of each pair, its coefficient and place in the order
    heard = work.tokens * (hidden * item + 20 * work.top_k)
    # what the experts and the router gave, and the gradient; the token of each pair
    said = work.tokens * ((1 + work.backward) * hidden * item + 4 * e.n + 8 * work.top_k)
    share = min(work.batch, FULL * work.batch * work.top_k // e.n + 1)
    largest = max(e.gate_up[0] * e.gate_up[1], e.down[0] * e.down[1])
    # all widths at once, stacked; and what rounding one of the matrices takes
    trials = work.widths * (e.weights + largest) * item
    trials += 10 * largest * 4 if work.widths else 0
    seen = share * ((5 * hidden + rows + 3 * wide) * item + 32 * hidden)
    seen += work.widths * share * (rows + wide + 2 * hidden) * item
    sampled = min(SAMPLE_BYTES, 8 * SAMPLE * e.n * (e.n + hidden))
    return {
        "load": {
            **layer,
            **states,
            ("a layer as it is on disk", "host"): read,
            ("a layer put together", "device"): 2 * e.n * rows * e.gate_up[1] * item,
        },
        "pass": {
            **layer, **ahead, **states, **passing, ("what the block heard", "heard"): heard + said,
        },
        "experts": {
            **layer, **ahead, **states, ("what the block heard", "heard"): heard + said,
            ("what is counted of each pair", "device"): 24 * work.tokens * work.top_k,
            ("trials of one expert", "device"): trials + seen,
            **({("a sample through all experts", "device"): sampled} if work.searched else {}),
        },
        "loss": {
            **layer, **states,
            ("logits of a window", "device"): 7 * work.window * work.vocabulary * 4,
        },
        "round": {
            **layer, **ahead, **few, ("what the block heard", "heard"): heard,
            ("experts being rounded", "device"): _rounding(work, chunk),
        },
        "write": {
            **layer, **few, ("what is written", "host"): 2 * max(work.layer_stored, 2 * work.outer_weights),
        },
        "check": {
            ("embeddings and head", "device"): work.outer_weights * item,
            **few,
            ("the output, opened afresh", "device"): out_bytes + work.layer_weights * item,
            ("the process that opens it", "host"): RUNTIME_BYTES + min(out_bytes, SINGLE_BYTES),
        },
        "by layer": _by_layer(work, read),
    }  # fmt: skip


def _by_layer(work: Work, read: int) -> dict[tuple[str, str], int]:
    """What `depth.by_depth` holds: a sample for every number of layers, and models a layer each."""
    sample = max(SAMPLE_TOKENS, work.window) * work.token_bytes
    models, row = 3 if work.skips else 2, replace(work, batch=work.window, backward=False)
    return {
        ("embeddings and head of each model", "device"): models * work.outer_weights * work.item,
        ("a layer", "device"): work.layer_weights * work.item,
        ("the next layer, read ahead", "host"): read,
        ("a sample for every number of layers", "host"): (work.layers + BESIDE) * sample,
        ("a sample in each model", "device"): 2 * models * sample,
        ("a batch in the layer", "device"): _activations(row),
        ("logits of a window", "device"): 7 * work.window * work.vocabulary * 4,
    }


def _activations(work: Work) -> int:
    """Of one batch in one layer; on the way back, of its graph and the gradients too."""
    e, k = work.widest, work.top_k
    outside = 6 * work.hidden + sum(rows for rows, _ in work.rest)
    pairs = k * (3 * work.hidden + e.gate_up[0] + 2 * e.down[1])
    own = work.batch * (outside + pairs) * work.item
    if work.eager_attention:
        own += 2 * work.batch * work.window * work.heads * work.item
    return 2 * own if work.backward else own


def _rounding(work: Work, chunk: int) -> int:
    """Gram matrices and weights of as many experts as go together, or of the weights beside them."""
    e = work.widest
    columns = max(e.gate_up[1], e.down[1])
    # as in pack.chunks
    each = 24 * columns**2 + 20 * max(e.gate_up[0] * e.gate_up[1], e.down[0] * e.down[1])
    together = max(1, min(e.n, chunk // each)) * each
    beside = sum(8 * n**2 for _, n in work.rest) + max(
        (16 * n**2 + 20 * m * n for m, n in work.rest), default=0
    )
    return max(together, beside) if work.wants_gram else together
