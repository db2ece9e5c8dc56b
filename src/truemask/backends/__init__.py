"""Who computes attention: `base` is the contract and its laws; no backend imports another."""
