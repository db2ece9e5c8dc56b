"""The tour: six acts about what attention masks do, measured while you watch."""
