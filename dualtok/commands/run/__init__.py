"""``dualtok run``: the whole way from documents to a report, from one file."""
