"""Teachers: one adapter per model family."""
