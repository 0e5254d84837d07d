"""Loaders of training images, and what each must show before it is timed."""
