"""The tour: eight acts about what attention masks do, measured while you watch."""
