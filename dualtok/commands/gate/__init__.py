"""``dualtok gate``: whether a report keeps to limits."""
