"""What a run shows while it lasts: TensorBoard events and the terminal's progress."""
