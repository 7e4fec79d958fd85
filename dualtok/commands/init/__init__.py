"""``dualtok init``: a run file of the few settings that matter, for some documents, a model and a machine."""
