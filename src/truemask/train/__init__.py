"""Training on bytes of real text: rows of packed documents, checkpoints, a loop. Used by the command line only."""
