"""`tide demo`: the whole path on CPU."""
