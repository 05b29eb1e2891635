"""What a little training buys: losses, one loop, and what is trained with them.

The engine is torch's and transformers' own (FSDP2, expert parallelism); see `student.py`.
"""
