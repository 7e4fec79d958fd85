"""Whether a run will fit, from its configuration alone: no weight is read."""
