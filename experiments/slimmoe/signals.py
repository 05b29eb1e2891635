"""Which loss to score channels by: KL to the original where they are cut at once, and nothing is taught.

    python -m experiments.slimmoe.signals MODEL --data TRAIN.jsonl.xz [--share 0.5]

Scored on 32 windows of 256 tokens of train text, measured on 12 of other documents of it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from pathlib import Path

import torch

from moecule.data import Sampling, read_texts, split_windows
from moecule.moe import experts_in, find_layers, put_experts
from moecule.session import Compute, open_checkpoint, tokenizer_of
from moecule.train.losses import distil
from moecule.train.sensitivity import SIGNALS, feel
from moecule.train.student import open_teacher
from moecule.width import of_one_width

DOCUMENTS, WINDOWS, HELD_OUT, LENGTH = 3000, 32, 12, 256
TOGETHER = (1, 8)  # windows that make one batch of the scores


def main() -> None:
    """Print a line of JSON for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--share", type=float, default=0.5)
    args = parser.parse_args()
    texts = read_texts(args.data)[:DOCUMENTS]
    tokenizer = tokenizer_of(open_checkpoint(args.model).path)
    windows, held = split_windows(tokenizer, texts, Sampling(WINDOWS), LENGTH, HELD_OUT)
    teacher = open_teacher(args.model, Compute(dtype="float32"))
    held = held.to(teacher.device)
    for signal, full, together in itertools.product(SIGNALS, (False, True), TOGETHER):
        felt = feel(teacher, teacher, list(windows.split(together)), signal, full=full)
        model = copy.deepcopy(teacher)
        for i, layer in enumerate(find_layers(model)[1]):
            for _, module in experts_in(layer):
                width = int(args.share * felt.channels[i].shape[1])
                put_experts(module, of_one_width(module, felt.channels_kept(width)[i]))
        with torch.no_grad():
            kl = float(distil(model(held).logits, teacher(held).logits))
        row = {"model": Path(args.model).name, "share": args.share, "signal": signal, "full": full}
        print(json.dumps({**row, "batch": together, "kl": round(kl, 4)}), flush=True)


if __name__ == "__main__":
    main()
