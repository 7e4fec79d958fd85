"""Documents of files of any kind, and the bundled corpora."""
