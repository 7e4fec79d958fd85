"""``dualtok score``."""
