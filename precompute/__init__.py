"""Stage one: corpus and teacher in, logit dataset out."""
