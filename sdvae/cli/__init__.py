"""The command line: one file per subcommand. Importing it loads no torch."""
