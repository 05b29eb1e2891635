"""The loop, what can be thawed, and healing."""
