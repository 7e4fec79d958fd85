"""The settings, described from the classes that read them: for the documentation, the terminal and editors."""
