"""The language of masks: expressions without size or tensor, each of which answers `truth` and `tile`."""
