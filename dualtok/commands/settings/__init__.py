"""``dualtok settings`` and ``dualtok schema``: what a run file may hold."""
