"""What a model's folder holds: its weights, whether they fit, how they are written, and mixed."""
