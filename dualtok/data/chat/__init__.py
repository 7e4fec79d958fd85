"""Conversations: read, written with a chat template, and which of their tokens are trained."""
