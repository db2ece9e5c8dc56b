"""Pictures of masks of any size, in text, as SVG and as PNG."""
