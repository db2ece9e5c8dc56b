"""Understanding a mask: what is likely wrong with it, why a cell is as it is, and what layers of it let through."""
