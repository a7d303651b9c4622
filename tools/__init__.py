"""The `tide` command line."""
