"""Triton kernels: each with its launcher, and nothing about models. The reference is plain torch."""
