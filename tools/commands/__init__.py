"""The subcommands of `tide`, a module each: options in, results and errors out."""
