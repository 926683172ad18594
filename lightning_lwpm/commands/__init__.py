"""What the subcommands of ``lwpm`` do."""
