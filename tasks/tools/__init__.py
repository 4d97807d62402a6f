"""The command `mta`: `mta --help`."""
