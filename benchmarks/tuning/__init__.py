"""Search of the kernels' configurations on the device at hand."""
