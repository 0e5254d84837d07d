"""Every operation of stopfast: the eager definitions, and the fused kernels beside them."""

# In a checkout's root the folder is importable as `kernels` too, and one file must not become two modules.
# There it is an empty package, not an error: others look for the Hugging Face library of that name.
if __name__ != "stopfast.kernels":
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(f"no {name!r} in {__name__!r}: use 'stopfast.kernels', its one name")
