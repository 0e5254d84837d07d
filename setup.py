"""Ship the top-level ``kernels/`` folder as the package ``stopfast.kernels``."""

from setuptools import find_packages, setup

stopfast = find_packages(
    include=["stopfast", "stopfast.*"], exclude=["stopfast.kernels", "stopfast.kernels.*"]
)
kernels = ["stopfast.kernels"] + [f"stopfast.kernels.{name}" for name in find_packages("kernels")]

setup(packages=stopfast + kernels, package_dir={"stopfast.kernels": "kernels"})
