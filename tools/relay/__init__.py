"""The relay: a dataset made on one machine teaches a student on another."""
