"""Arrays only: three-valued logic, range questions, tile maps and pictures. Nothing here knows what a mask is."""
