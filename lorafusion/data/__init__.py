"""Sample lengths (pure Python and NumPy) and tokens (torch), kept apart so that planning needs no torch."""
