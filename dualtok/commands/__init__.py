"""One module per verb of the command line: each wires the rooms together and owns no method of its own."""
