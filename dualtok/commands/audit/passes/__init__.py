"""The audit's runs of models: signals of one pass, reruns over changed texts, continuations, canaries."""
