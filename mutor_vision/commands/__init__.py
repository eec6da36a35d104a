"""One module a subcommand of `mutor`: its flags and its body."""
