"""Other libraries and older versions on dualtok's exports, in an environment of their own: `make test-peers`."""
