"""Every operation of stopfast: eager definitions now, fused kernels beside them."""

# One file must not become two modules: the folder is importable as `kernels` from a checkout's root.
if __name__ != "stopfast.kernels":
    raise ImportError(
        f"imported as {__name__!r}: use 'stopfast.kernels', the one name of this package"
    )
