"""gpt-oss: biases, interleaved gate and up, softmax over the chosen logits."""

from moecule.family import Family

FAMILY = Family("gpt_oss", router="router", count_keys=("num_local_experts",))
