"""Figures with intervals and checks, from the scores of attacks."""
