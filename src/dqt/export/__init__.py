"""Export: a finished model as files for other programs, and the proof that they compute the same."""
