"""The process that `llama.py` starts: python llama_child.py FILE TOKENS LOGITS, both .npy.

It imports nothing of this package, which takes longer than llama.cpp takes to answer.
"""

from __future__ import annotations

import sys

import llama_cpp
import numpy as np

FLOAT32 = 0  # ggml's number for the type, here of the cache


def _answer(file: str, given: str, made: str) -> None:
    ids = np.load(given).tolist()
    model = llama_cpp.Llama(
        file, n_ctx=len(ids), logits_all=True, verbose=False, type_k=FLOAT32, type_v=FLOAT32
    )
    model.eval(ids)
    np.save(made, np.array(model.scores[: len(ids)], dtype=np.float32))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
