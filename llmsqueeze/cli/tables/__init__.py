"""The results of the verbs as tables on the terminal."""
