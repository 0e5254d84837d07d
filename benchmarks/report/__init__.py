"""Tables and plots of the newest results."""
