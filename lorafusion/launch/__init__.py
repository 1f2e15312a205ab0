"""Start the processes of a run, watch them, and say what happened."""
