"""`truemask doctor`: what is installed, which backends run here, and a test of them in a few seconds."""
