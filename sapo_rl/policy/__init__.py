"""The trainer's side: the model, packed batches, log-probabilities, updates and checkpoints."""
