"""One file for each subcommand of `truemask`: its options, what it asks of the library, what it prints."""
