"""Ranks of a job: how they find, watch and tell each other, and how DeepSpeed is set up."""
