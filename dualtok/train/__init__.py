"""DeepSpeed around a model and its objective: configuration, ranks, the training loop, checkpoints."""
