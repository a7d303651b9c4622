"""`tide inspect`: a logit dataset as people look at it."""
