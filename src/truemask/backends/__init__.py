"""Who computes attention: `base` is the contract and its laws; the others are the ways, none of which imports another."""
