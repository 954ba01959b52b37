"""How the trainer's weights reach vLLM."""
