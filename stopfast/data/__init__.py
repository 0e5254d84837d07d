"""Images: folders, what is drawn for each sample, and decoding."""
