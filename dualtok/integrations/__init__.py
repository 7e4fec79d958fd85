"""dualtok inside other people's training programs."""
