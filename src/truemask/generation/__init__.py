"""Generation: the key/value cache, sampling, and the autoregressive wrapper. The public names are in `truemask`."""
