"""The stages of a run: how each begins, its steps, and its end."""
