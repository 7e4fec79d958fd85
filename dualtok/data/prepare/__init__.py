"""From documents to a prepared folder."""
