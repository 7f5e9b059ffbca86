"""What the claims in docs/ rest on; each command prints a table and can write it as JSON."""
