"""``dualtok audit``."""
