"""``dualtok plan``."""
