"""Aria: softmax over the chosen logits; experts transposed."""

from moecule.family import Family

FAMILY = Family("aria", router="router", count_keys=("moe_num_experts",), since="5.18")
