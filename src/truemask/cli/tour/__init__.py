"""The tour: five acts about what attention masks do, measured while you watch."""
