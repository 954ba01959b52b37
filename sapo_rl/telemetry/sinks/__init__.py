"""Where a run's numbers and completions go: the terminal, Parquet, Weights & Biases."""
