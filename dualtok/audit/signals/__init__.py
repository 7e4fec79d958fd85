"""What one pass of a model leaves of each document, and how it is computed."""
