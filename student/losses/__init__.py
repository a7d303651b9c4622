"""Pure losses on tensors, one file per family."""
