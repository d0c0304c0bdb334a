"""What only a GPU can show. Where a test has a meaning on a CPU as well it runs there too, so that it is run at all."""
