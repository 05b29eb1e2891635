"""Train the embedded model: a stock Mixtral of 4.7M parameters, 2 of 8 experts, on one GPU.

Training is bounded by the clock, not by steps: the learning rate follows the share of the time
that has passed, so a slower GPU still ends at a finished model, only a less trained one.

    python experiments/embedded/train.py TOKENS.bin --out moecule/assets/model
"""

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

WINDOW = 512
WARM_UP = 0.03  # share of the time


def make_model(vocabulary: int, end: int) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    return MixtralForCausalLM(config)


def batches(tokens: Tensor, rows: int) -> Iterator[Tensor]:
    """Yield [rows, WINDOW] without end, each epoch cut at another offset and shuffled anew."""
    while True:
        start = int(torch.randint(WINDOW, ()))
        count = (len(tokens) - start) // WINDOW
        windows = tokens[start : start + count * WINDOW].view(count, WINDOW)
        for chosen in torch.randperm(count, device=tokens.device).split(rows):
            if len(chosen) == rows:
                yield windows[chosen].long()


def rate(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def train(model: MixtralForCausalLM, tokens: Tensor, args: argparse.Namespace) -> None:
    # Autocast does not reach the grouped matrix product of the experts, so the model itself is
    # bf16 and the optimiser steps float32 masters that are copied into it.
    weights = list(model.parameters())
    masters = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data = weight.data.bfloat16()
    optimiser = torch.optim.AdamW(
        [
            {"params": [m for m in masters if m.ndim > 1], "weight_decay": 0.1},
            {"params": [m for m in masters if m.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    step_model = torch.compile(model) if args.compile else model
    experts, active = model.config.num_local_experts, model.config.num_experts_per_tok
    balance = model.config.router_aux_loss_coef
    model.train()
    running = torch.zeros((), device=tokens.device)
    began = last = time.monotonic()
    for step, batch in enumerate(batches(tokens, args.rows)):
        if step == 3:  # compiling is not training
            began = last = time.monotonic()
        progress = (time.monotonic() - began) / args.seconds if step >= 3 else 0.0
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = args.rate * rate(progress)
        out = step_model(input_ids=batch, labels=batch, output_router_logits=True)
        # The stock loss balances the experts over all layers together, which lets one layer use
        # half its experts as long as another uses the other half; so balance each layer.
        each = [
            load_balancing_loss_func((logits,), experts, active) for logits in out.router_logits
        ]
        loss = out.loss + balance * (torch.stack(each).mean() - out.aux_loss)
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        running += loss.detach()
        if step % args.every == args.every - 1:
            mean, now = running.item() / args.every, time.monotonic()
            speed = args.every * batch.numel() / (now - last)
            print(f"step {step + 1}  {progress:4.0%}  loss {mean:.3f}  {speed / 1e6:.2f}M tokens/s")
            running.zero_()
            last = time.monotonic()
    seen = step * args.rows * WINDOW
    print(f"{step} steps, {seen / 1e6:.0f}M tokens, {seen / len(tokens):.1f} epochs")


@torch.no_grad()
def held_out(folder: Path, assets: Path, device: str) -> None:
    """Print, from the saved files and in float32, the loss a domain and each expert's share."""
    torch.backends.cuda.matmul.allow_tf32 = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).to(device)
    experts, active = model.config.num_local_experts, model.config.num_experts_per_tok
    used = torch.zeros(model.config.num_hidden_layers, experts, device=device)
    losses = []
    for path in sorted((assets / "text" / "eval").glob("*.txt")):
        ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).to(device)
        total = 0.0
        for batch in windows.split(16):
            out = model(input_ids=batch, output_router_logits=True, use_cache=False)
            logits = out.logits[:, :-1].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(
                logits, batch[:, 1:].flatten(), reduction="sum"
            ).item()
            for layer, router in enumerate(out.router_logits):
                chosen = router.topk(active, dim=-1).indices.flatten()
                used[layer] += torch.bincount(chosen, minlength=experts)
        losses.append(total / (len(windows) * (WINDOW - 1)))
        print(f"held-out {path.stem:<10} {losses[-1]:.4f} nats/token, {len(windows)} windows")
    print(f"held-out mean       {sum(losses) / len(losses):.4f}")
    for layer, counts in enumerate(used):
        shares = " ".join(f"{share:5.1%}" for share in (counts / counts.sum()).tolist())
        print(f"layer {layer} experts  {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path, help="the uint16 tokens that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--assets", type=Path, default=Path("moecule/assets"))
    parser.add_argument("--seconds", type=float, default=240, help="how long to train")
    parser.add_argument("--rows", type=int, default=64, help="windows a batch")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--every", type=int, default=500, help="steps between printed lines")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile"
    )
    parser.add_argument("--device", default="cuda", help="where to train")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    source = args.assets / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = make_model(len(tokenizer), tokenizer.eos_token_id).to(args.device)
    model.set_experts_implementation("grouped_mm")
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f}M parameters")
    tokens = torch.from_numpy(np.fromfile(args.tokens, dtype=np.uint16).astype(np.int32))
    train(model, tokens.to(args.device), args)

    model.save_pretrained(args.out)
    if args.out.resolve() != source.resolve():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, args.out / name)
    held_out(args.out, args.assets, args.device)


if __name__ == "__main__":
    main()
