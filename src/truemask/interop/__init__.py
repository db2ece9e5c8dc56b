"""Models of other libraries, with this library's masks and attention: `tm.use` and `tm.enable`."""
