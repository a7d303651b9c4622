"""`tide walk`: every step that one sample takes."""
