"""How the trainer's weights reach vLLM: shared memory on this machine, or a broadcast to servers."""
