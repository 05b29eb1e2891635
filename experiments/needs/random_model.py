"""A Mixtral of random weights, as large as asked, with the embedded model's tokenizer.

python random_model.py OUT HIDDEN WIDTH LAYERS EXPERTS
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moecule.session import ASSETS


def main(out: str, hidden: str, width: str, layers: str, experts: str) -> None:
    """Write it in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", hidden_size=int(hidden), intermediate_size=int(width), vocab_size=4096,
        num_hidden_layers=int(layers), num_local_experts=int(experts), num_experts_per_tok=2,
        num_attention_heads=int(hidden) // 64, num_key_value_heads=int(hidden) // 256,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    for file in (ASSETS / "model").glob("tokenizer*"):
        shutil.copy(file, Path(out) / file.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
