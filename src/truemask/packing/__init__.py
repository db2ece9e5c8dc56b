"""Packing: many sequences in few rows, so that nothing is computed for padding, and no token reads another sequence."""
