"""Will it fit: memory of a run, computed without reading a weight."""
