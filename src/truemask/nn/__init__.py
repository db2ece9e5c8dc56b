"""The modules: plain `torch.nn` blocks that know masks and `attend`. Public names are in the face, `truemask`."""
