"""The audit: signals (one pass per model) -> attacks -> metrics -> report. Arrays and tensors in, figures out."""
